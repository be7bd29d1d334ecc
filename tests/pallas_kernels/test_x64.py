"""Under `jax_enable_x64` every op gives the bits that it gives without, jitted or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.backends import interpret_kernels
from pallas_kernels.codecs.presets import get_codec
from pallas_kernels.layouts.choose import default_layout
from pallas_kernels.layouts.plain import Plain
from tests.pallas_kernels.paged_attention.paged_cases import SCALE
from tests.pallas_kernels.paged_attention.triton.kernel_cases import make_case

DRAWN = np.random.default_rng(0).standard_normal((2, 1, 3, 2, 16, 64), np.float32)
RULE = pk.Rule(window=40, sink_tokens=5)


def empty(codec, platform):
    codec = get_codec(codec)
    if codec.lossy:
        layout = default_layout(codec, platform=platform, kv_heads=2, head_dim=64, page_size=16)
    else:
        layout = Plain(codec=codec, head_dim=64, page_size=16)
    return pk.empty_pages(layout, layers=1, pages=3, kv_heads=2)


def write(codec, backend):
    """Integers have 64 bits where the flag allows them."""
    k, v = jnp.asarray(DRAWN[:, 0, :1, :, :3].swapaxes(2, 3))
    slot = jnp.asarray([[3, 5, 0]])
    where = dict(page=1 + slot % 2, slot=slot, writes=slot > 0)
    return pk.write_pages(empty(codec, "cpu"), k, v, layer=0, **where, backend=backend)


def quantize(codec, platform, backend):
    exact, ids = pk.Pages.exact(*map(jnp.asarray, DRAWN)), jnp.asarray([1, 2])
    pages = empty(codec, platform)
    where = dict(source=ids, target=ids[::-1], wanted=ids > 0)
    return pk.quantize_pages(pages, exact, layer=None, **where, backend=backend)


@functools.cache
def make(store, q_lens):
    return make_case(store, lengths=(33, 70), q_lens=q_lens)


def attend(store, q_lens, backend):
    case = make(store, q_lens)
    part = pk.paged_attention(*case.arguments, RULE, layer=1, scale=SCALE, backend=backend)
    return pk.add_learned_sink(pk.merge(part, part), jnp.zeros(6))


CALLS = {
    "write": functools.partial(write, "int8", "xla"),
    "write, kernel": functools.partial(write, "exact", "gpu"),
    "quantize": functools.partial(quantize, "int8", "cpu", "xla"),
    "quantize, kernel": functools.partial(quantize, "int8", "gpu", "gpu"),
    "decode": functools.partial(attend, "bfloat16", (1, 1), "xla"),
    "decode, kernel": functools.partial(attend, "tq4", (1, 1), "gpu"),
    "chunk, kernel": functools.partial(attend, "bfloat16", (12, 3), "gpu"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_bits_are_the_same(call):
    if call.func is attend:  # made outside of what is traced
        make(*call.args[:2])
    with interpret_kernels():
        want = jax.jit(call)()
        with jax.enable_x64(True):
            got = jax.jit(call)()
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_64_bit_numbers_are_taken_and_the_output_has_the_type_asked_for():
    case = make("bfloat16", (1, 1))
    with jax.enable_x64(True):
        wide = lambda x: x.astype({"f": "float64", "i": "int64"}[jnp.dtype(x.dtype).kind])
        queries, segment = jax.tree.map(wide, (pk.Queries(
            case.queries.q.astype(jnp.float32), case.queries.start, case.queries.lens
        ), case.segment))  # fmt: skip
        options = dict(layer=np.int64(1), scale=np.float64(SCALE), backend="xla")
        got = pk.paged_attention(queries, case.pages, segment, RULE, out_dtype="float64", **options)
        assert got.out.dtype == jnp.float64
    want = case.attend(RULE, backend="xla")
    np.testing.assert_array_equal(got.out.astype(np.float32), want.out)
