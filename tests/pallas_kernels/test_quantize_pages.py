"""The GPU kernel writes the codes and factors that plain XLA writes, into wanted pages only."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import CacheConfig, KVCache, LayerSpec
from jaxkv.codecs import get_codec
from pallas_kernels.backends import interpret_kernels
from pallas_kernels.pages import Pages
from pallas_kernels.quantize_pages import choose, quantize_pages, triton

LAYERS, KV_HEADS, PAGE = 3, 2, 16
SOURCE, TARGET = jnp.array([1, 2, 3], jnp.int32), jnp.array([4, 2, 5], jnp.int32)
WANTED = jnp.array([True, False, True])


@pytest.fixture(params=["interpret", pytest.param("compiled", marks=pytest.mark.gpu)])
def kernels(request):
    with interpret_kernels() if request.param == "interpret" else contextlib.nullcontext():
        yield
    if jax.default_backend() == "gpu":  # without a GPU no test runs compiled kernels afterwards
        jax.clear_caches()  # functions that were traced interpreted must not be called outside


def make_pages(name, head_dim, max_tokens=64, dtype="bfloat16"):
    """Coded pages of ones, to be overwritten, and exact pages of random keys and values."""
    codec = get_codec(name)
    codec = dataclasses.replace(codec, recent_pages=max(codec.recent_pages, 1))
    spec = LayerSpec(kv_heads=KV_HEADS, head_dim=head_dim, codec=codec, dtype=dtype)
    config = CacheConfig(
        layers=(spec,) * LAYERS, batch=3, max_tokens=max_tokens, page_size=PAGE, platform="gpu"
    )
    means = [np.full((KV_HEADS, head_dim), 0.5, np.float32)] * LAYERS
    newest, codes = KVCache.create(config, key_means=means).stores
    keys = jax.random.split(jax.random.key(7), 2)
    # Channels have a mean of 3, and token 5 of every page is zero.
    draw = lambda key: 3 + jax.random.normal(key, newest.pages.arrays["k"].shape, dtype)
    k, v = (draw(key).at[:, :, :, 5].set(0) for key in keys)
    old = jax.tree.map(jnp.ones_like, codes.pages)
    return old, Pages.exact(k, v)


def assert_quantizes_as_xla(old, exact, *, layer, source, target, wanted):
    options = dict(layer=layer, source=source, target=target, wanted=wanted)
    want = quantize_pages(old, exact, **options, backend="xla")
    got = quantize_pages(old, exact, **options, backend="gpu")
    touched = np.zeros(next(iter(old.arrays.values())).shape[:2], bool)
    touched[slice(None) if layer is None else layer, target[wanted]] = True
    for x, y, before in zip(*map(jax.tree.leaves, (want, got, old)), strict=True):
        x, y, before = map(np.asarray, (x, y, before))
        np.testing.assert_array_equal(y[~touched], before[~touched])
        assert (y[touched] != before[touched]).mean() > 0.5
        # Sums differ in their order, so a code at a threshold or a factor's last bit may differ.
        assert (x != y).mean() < 5e-3
    for a, b in zip(old.layout.unpack(want.arrays), old.layout.unpack(got.arrays), strict=True):
        for x, y in zip(a.factors, b.factors, strict=True):
            np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=0.1)


NAMES = ("tq4", "tq3", "tq2", "4bit_nc", "3bit_nc", "int8")


# Each codec at both sizes, once for one layer and once for all of them. Not every combination is
# needed, because the layer is only an index and not part of a tile.
@pytest.mark.parametrize(
    "name, head_dim, layer",
    [
        (name, head_dim, (None, 1)[(n + (head_dim == 128)) % 2])
        for n, name in enumerate(NAMES)
        for head_dim in (64, 128)
    ],
)
def test_pages_of_the_kernel_are_those_of_xla(name, head_dim, layer, kernels):
    pages = make_pages(name, head_dim)
    assert_quantizes_as_xla(*pages, layer=layer, source=SOURCE, target=TARGET, wanted=WANTED)


@pytest.mark.both_pythons
@pytest.mark.parametrize("name, n", [("int8", 1), ("int8", 8), ("int8", 11), ("tq4", 11)])
def test_programs_take_several_pages_of_the_list(name, n, kernels, monkeypatch):
    monkeypatch.setattr(triton, "PROGRAMS", 8 * LAYERS * KV_HEADS)
    # There are eight lanes. Of 11 entries, lanes 0 and 2 have two wanted pages, others one or none.
    wanted = jnp.array([1, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1], bool)[:n]
    i = jnp.arange(n, dtype=jnp.int32)
    pages = make_pages(name, 64, max_tokens=96)
    assert_quantizes_as_xla(*pages, layer=None, source=1 + i % 3, target=n - i, wanted=wanted)


@pytest.mark.parametrize("name", ["tq4", "int8"])
def test_codes_are_chosen_against_the_stored_factors(name):
    """Compiled codes equal those of stepwise numpy casts, though XLA may drop casts to float16."""
    tensor = get_codec(name).key if name == "int8" else get_codec("4bit_nc").value
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    codes, (scale, zero) = jax.tree.map(np.asarray, jax.jit(tensor.quantize)(x))
    steps = (x - zero[:, None].astype(np.float32)) / scale[:, None].astype(np.float32)
    want = np.clip(np.floor(steps + np.float32(0.5)), 0, 2**tensor.bits - 1)
    assert (codes != want).mean() < 1e-4


def test_what_the_kernel_does_not_serve_is_named():
    pages, _ = make_pages("tq4", 96)
    assert choose(None, pages, platform="gpu") == "xla"
    with pytest.raises(NotImplementedError, match="head_dim=96"):
        choose("gpu", pages, platform="gpu")
    pages, _ = make_pages("tq4", 64)
    assert choose(None, pages, platform="gpu") == "gpu"
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        choose("gpu", pages, platform="cpu")
    pages, _ = make_pages("fp8_e4m3", 64)
    assert choose(None, pages, platform="gpu") == "xla"
    with pytest.raises(NotImplementedError, match="fp8_e4m3: the GPU kernel writes integer codes"):
        choose("gpu", pages, platform="gpu")
