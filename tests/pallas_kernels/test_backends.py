"""A backend is named or chosen by platform, and is never swapped silently."""

from types import SimpleNamespace
from typing import Any

import pytest

from pallas_kernels.backends import choose_backend, interpret_kernels

ANY = SimpleNamespace(refusal=lambda **call: None)
EVEN = SimpleNamespace(refusal=lambda n: f"n={n} is odd" if n % 2 else None)
MODULES: Any = {"xla": ANY, "reference": ANY, "gpu": EVEN}


def choose(backend, platform, n=0):
    return choose_backend("op", backend, MODULES, platform, n=n)


def test_a_platform_without_a_backend_of_its_own_takes_xla():
    assert choose(None, "cpu") == choose(None, "tpu") == "xla"


def test_the_platforms_own_is_chosen_where_it_serves_the_call():
    assert choose(None, "gpu") == "gpu"
    assert choose(None, "gpu", n=1) == "xla"


def test_a_named_backend_is_taken():
    assert choose("reference", "gpu") == "reference"
    assert choose("gpu", "gpu") == "gpu"


def test_a_named_backend_that_does_not_serve_the_call_says_why():
    with pytest.raises(NotImplementedError, match="^op: n=1 is odd.$"):
        choose("gpu", "gpu", n=1)


def test_a_named_backend_needs_its_device_unless_interpreted():
    with pytest.raises(NotImplementedError, match="^op: backend='gpu' needs an NVIDIA GPU, and "):
        choose("gpu", "cpu")
    with interpret_kernels():
        assert choose("gpu", "cpu") == "gpu"
        assert choose(None, "cpu") == "xla"


def test_names_that_the_op_or_nobody_has():
    with pytest.raises(NotImplementedError, match="^op has no 'tpu' backend; it runs on: xla, "):
        choose("tpu", "tpu")
    with pytest.raises(ValueError, match="^backend='cuda' must be one of xla, reference, gpu, tpu"):
        choose("cuda", "gpu")
