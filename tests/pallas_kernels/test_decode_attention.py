"""`decode_attention` on head-major pools equals a plain softmax over each sequence's tokens."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.backends import interpret_kernels

LENGTHS, PAGE, KV_HEADS, GROUP, HEAD_DIM, PAGES = (1, 16, 17, 45, 0), 16, 2, 3, 64, 20


def make_case(dtype):
    """Pools of NaN but for the tokens, shuffled pages, garbage behind a table's last page."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q = normal(len(LENGTHS), KV_HEADS * GROUP, HEAD_DIM)
    k, v = normal(2, len(LENGTHS), KV_HEADS, max(LENGTHS), HEAD_DIM).astype(jnp.dtype(dtype))
    pools = np.full((2, KV_HEADS, PAGES, PAGE, HEAD_DIM), np.nan, k.dtype)
    table = np.full((len(LENGTHS), 4), 10**6, np.int32)
    free = iter(rng.permutation(PAGES))
    for b, length in enumerate(LENGTHS):
        for start in range(0, length, PAGE):
            page = table[b, start // PAGE] = next(free)
            stop = min(length, start + PAGE)
            for pool, x in zip(pools, (k, v), strict=True):
                pool[:, page, : stop - start] = x[b, :, start:stop]
    return q, k, v, pools, table


def softmax_attention(q, k, v, *, scale, window, soft_cap):
    out = np.zeros(q.shape)
    for b, length in enumerate(LENGTHS):
        first = 0 if window is None else max(0, length - window)
        for h in range(q.shape[1] if length else 0):
            keys, values = (x[b, h // GROUP, first:length].astype(np.float64) for x in (k, v))
            s = scale * keys @ q[b, h]
            s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
            p = np.exp(s - s.max())
            out[b, h] = p @ values / p.sum()
    return out


@pytest.mark.parametrize("options", [dict(), dict(window=18, soft_cap=2.0)], ids=str)
@pytest.mark.parametrize(
    "backend",
    ["xla", "reference", "interpret", pytest.param("gpu", marks=pytest.mark.gpu)],
)
def test_equals_a_plain_softmax(backend, options):
    q, k, v, (k_pages, v_pages), table = make_case("float32")
    call = functools.partial(decode_attention, scale=0.2, **options)
    with interpret_kernels() if backend == "interpret" else contextlib.nullcontext():
        backend = "gpu" if backend == "interpret" else backend
        arrays = map(jnp.asarray, (q, k_pages, v_pages, table, np.asarray(LENGTHS, np.int32)))
        out = call(*arrays, backend=backend)
    want = softmax_attention(q, k, v, **dict(scale=0.2, window=None, soft_cap=None) | options)
    np.testing.assert_allclose(out, want, atol=3e-6)
    np.testing.assert_array_equal(out[-1], 0)


def test_output_has_the_type_of_the_queries_and_no_pool_is_copied():
    q, k, v, pools, table = make_case("bfloat16")
    arrays = (jnp.asarray(q, jnp.bfloat16), *map(jnp.asarray, (*pools, table)))
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    call = jax.jit(functools.partial(decode_attention, scale=0.2))
    out = call(*arrays, lengths)
    assert out.dtype == jnp.bfloat16
    want = softmax_attention(q, k, v, scale=0.2, window=None, soft_cap=None)
    np.testing.assert_allclose(out.astype(np.float32), want, atol=0.02)
    text = jax.jit(functools.partial(decode_attention, scale=0.2)).lower(*arrays, lengths).as_text()
    moved = f"tensor<{PAGES}x{KV_HEADS}x{PAGE}x{HEAD_DIM}xbf16>"
    assert moved not in text
