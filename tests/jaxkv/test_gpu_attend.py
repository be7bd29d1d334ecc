"""The cache with the GPU kernel gives the same results as with any backend.

On a CPU the kernel is interpreted; with a GPU the same steps run compiled (pytest -m gpu).
"""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from jaxkv import CacheConfig, LayerSpec
from jaxkv.codecs import get_codec
from pallas_kernels.backends import interpret_kernels
from tests.helpers import CodedTwin

PAGE, HEAD_DIM, STEP = 16, 64, 5
STEPS = [
    *[((5, 3, 5), None)] * 6,
    ((5, 5, 5), (2, 0, 5)),  # drafts, partly rejected
    ((1, 1, 0), None),
    *[((5, 5, 1), (4, 5, 1))] * 6,
    *[((1, 1, 1), None)] * 3,
]
CASES = {
    "full": dict(codec="exact", dtype="bfloat16"),
    "window and sinks": dict(codec="exact", window=27, sink_tokens=3, sinks=True),
    "4bit_nc": dict(codec="4bit_nc", soft_cap=1.5),
    "4bit_nc, window, sinks": dict(codec="4bit_nc", window=27, sink_tokens=20, sinks=True),
    "tq4": dict(codec="tq4", recent_pages=1, sinks=True),
    "tq3, window": dict(codec="tq3", recent_pages=1, window=27, sink_tokens=3),
    "int8": dict(codec="int8", window=27),
    "sinks by their own query": dict(
        codec="k8v4", window=27, sink_tokens=3, sink_positions="cache"
    ),
}


@pytest.fixture(params=["interpret", pytest.param("compiled", marks=pytest.mark.gpu)])
def kernels(request):
    interprets = request.param == "interpret"
    with interpret_kernels() if interprets else contextlib.nullcontext():
        yield
    jax.clear_caches()  # functions that were traced interpreted must not be called outside


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_gpu_backend_through_the_cache(case, kernels):
    case = dict(case)
    codec = get_codec(case.pop("codec"))
    if (recent_pages := case.pop("recent_pages", None)) is not None:
        codec = dataclasses.replace(codec, recent_pages=recent_pages)
    options = {name: case.pop(name) for name in ("sinks", "soft_cap") if name in case}
    # Exact pages beside codes are float32: values of few bits tie in the code search, and then it
    # depends on the order of a sum which of two codes wins.
    case = {"dtype": "float32"} | case
    spec = LayerSpec(kv_heads=2, head_dim=HEAD_DIM, codec=codec, **case)
    config = CacheConfig(
        layers=(spec,),
        batch=3,
        max_tokens=80,
        max_new_tokens=STEP,
        page_size=PAGE,
        platform="gpu",
    )
    twin = CodedTwin(config, q_heads=6, backend="gpu", **options)
    for number, (new, accepted) in enumerate(STEPS):
        got, expected = map(np.stack, zip(*twin.step(new, accepted), strict=True))
        np.testing.assert_array_equal(got[np.abs(expected).max(axis=(2, 3)) == 0], 0)
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error <= 3e-3, f"step {number}"
