"""Ops name what is wrong with a call in one sentence, before anything is traced or compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.checks import layer_index
from pallas_kernels.codecs.codec import Exact
from pallas_kernels.codecs.presets import get_codec
from pallas_kernels.device import current_platform
from pallas_kernels.layouts.token_major import TokenMajor
from pallas_kernels.paged_attention import choose

ONE = jnp.ones(1, jnp.int32)
Q = jnp.zeros((1, 1, 4, 8))
K = jnp.zeros((1, 1, 2, 8))
POOL = jnp.zeros((2, 3, 2, 4, 8))
EXACT = pk.Pages.exact(POOL, POOL)
TABLE = jnp.ones((1, 2), jnp.int32)


def coded(codec):
    layout = TokenMajor(codec=get_codec(codec), head_dim=8, page_size=4, word_bits=16)
    return pk.empty_pages(layout, layers=2, pages=3, kv_heads=2)


def attend(*, q=Q, pages=EXACT, table=TABLE, start=ONE, sinks=None, rule=None, **options):
    rule = pk.Rule() if rule is None else rule
    queries, segment = pk.Queries(q, start, ONE), pk.Segment(table, 0 * ONE, ONE, sinks)
    return pk.paged_attention(queries, pages, segment, rule, **dict(layer=0, scale=1.0) | options)


def write(*, pages=EXACT, k=K, v=K, page=ONE[:, None], writes=ONE[:, None] > 0, layer=0):
    slot = jnp.zeros_like(ONE[:, None])
    return pk.write_pages(pages, k, v, layer=layer, page=page, slot=slot, writes=writes)


def quantize(*, codes="int8", exact=EXACT, source=ONE, wanted=ONE > 0, layer=None):
    codes = coded(codes) if isinstance(codes, str) else codes
    return pk.quantize_pages(codes, exact, layer=layer, source=source, target=ONE, wanted=wanted)


def decode(*, q=Q[:, 0], k=POOL[0], table=TABLE, lengths=ONE, scale=1.0, **options):
    k = jnp.swapaxes(k, 0, 1) if k is POOL[0] else k
    return pk.decode_attention(q, k, k, table, lengths, scale=scale, **options)


HEADS_FIRST = jnp.zeros((2, 3, 4, 8))
LAG = pk.PageLag
CASES = [
    (attend, dict(q=Q.astype(jnp.int32)), "q.dtype=int32 must be a float type."),
    (attend, dict(q=Q > 0), "q.dtype=bool must be a float type."),
    (attend, dict(q=Q.astype(jnp.complex64)), "q.dtype=complex64 must be a float type."),
    (attend, dict(q=Q[:, :0]), "q_tokens=0 must be at least 1."),
    (attend, dict(table=TABLE[:, :0]), "width=0 must be at least 1."),
    (attend, dict(sinks=TABLE[:, :0]), "sink_pages=0 must be at least 1."),
    (attend, dict(table=TABLE * 1.0), "page_table.dtype=float32 must be int32."),
    (attend, dict(sinks=TABLE > 0), "sink_table.dtype=bool must be int32."),
    (attend, dict(start=ONE * 1.0), "q_start.dtype=float32 must be int32."),
    (attend, dict(layer=2), "layer=2 must be at most 1."),
    (attend, dict(layer=-1), "layer=-1 must not be negative."),
    (attend, dict(layer=jnp.int32(2)), "layer=2 must be at most 1."),
    (attend, dict(layer=1.0), "layer=1.0 must be a whole number."),
    (attend, dict(layer=True), "layer=True must be a whole number, not a bool."),
    (attend, dict(layer=jnp.zeros(2, jnp.int32)), "layer must be one integer, not int32[2]."),
    (attend, dict(scale=-1.0), "scale=-1.0 must be positive and finite."),
    (attend, dict(scale=float("nan")), "scale=nan must be positive and finite."),
    (attend, dict(scale=0), "scale=0.0 must be positive and finite."),
    (attend, dict(scale="1"), "scale='1' must be a number."),
    (attend, dict(scale=True), "scale=True must be a number."),
    (attend, dict(soft_cap=0), "soft_cap=0.0 must be positive and finite."),
    (attend, dict(soft_cap=np.inf), "soft_cap=inf must be positive and finite."),
    (attend, dict(out_dtype="int32"), "out_dtype=int32 must be a float type."),
    (attend, dict(rule=128), "rule must be a Rule, not int."),
    (attend, dict(pages=POOL), "pages must be a Pages, not ArrayImpl."),
    (attend, dict(rule=pk.Rule(window=0)), "window=0 must be at least 1, or None for all tokens."),
    (attend, dict(rule=pk.Rule(window=True)), "window=True must be a whole number, not a bool."),
    (attend, dict(rule=pk.Rule(window=2**31)), "window=2147483648 must be at most 2147483647."),
    (attend, dict(rule=pk.Rule(window=8.0)), "window=8.0 must be a whole number."),
    (attend, dict(rule=pk.Rule(sink_tokens=-1)), "sink_tokens=-1 must not be negative."),
    (attend, dict(rule=pk.Rule(lag=LAG(4, least=-1))), "lag.least=-1 must not be negative."),
    (attend, dict(rule=pk.Rule(lag=(4, 0, 1))), "lag must be a PageLag, not tuple."),
    (write, dict(k=K.astype(jnp.int8)), "k.dtype=int8 must be a float type."),
    (write, dict(v=K > 0), "v.dtype=bool must be a float type."),
    (write, dict(k=K * 1j), "k.dtype=complex64 must be a float type."),
    (write, dict(writes=ONE[:, None]), "writes.dtype=int32 must be bool."),
    (write, dict(page=ONE[:, None] * 1.0), "page.dtype=float32 must be int32."),
    (write, dict(layer=2), "layer=2 must be at most 1."),
    (
        write,
        dict(pages=coded("tq4")),
        "codec='tq4' keeps the mean of a whole page: write tokens into exact pages, and complete "
        "pages by quantize_pages.",
    ),
    (quantize, dict(wanted=ONE), "wanted.dtype=int32 must be bool."),
    (quantize, dict(source=ONE > 0), "source.dtype=bool must be int32."),
    (quantize, dict(source=TABLE[0]), "target.shape=(1,): n must be 2."),
    (quantize, dict(layer=5), "layer=5 must be at most 1."),
    (quantize, dict(codes=EXACT), "coded holds 'exact' pages; it must hold codes."),
    (
        quantize,
        dict(exact=coded("int8")),
        "exact holds 'int8' pages in TokenMajor; it must hold exact pages in Plain.",
    ),
    (decode, dict(k=HEADS_FIRST, q=Q[:, 0, :3]), "q_heads=3 must be a multiple of kv_heads=2."),
    (decode, dict(k=HEADS_FIRST, lengths=TABLE, table=ONE), "page_table.shape=(1,) must be [batch"),
    (decode, dict(k=HEADS_FIRST[..., :4]), "k_pages.shape=(2, 3, 4, 4): head_dim must be 8."),
    (decode, dict(k=HEADS_FIRST.astype(jnp.int8)), "dtype='int8' must be one of bfloat16, float16"),
    (decode, dict(k=HEADS_FIRST, q=Q[:0, 0], table=TABLE[:0], lengths=ONE[:0]), "batch=0 must be"),
    (decode, dict(k=HEADS_FIRST, window=0), "window=0 must be at least 1"),
    (decode, dict(k=HEADS_FIRST, scale=-0.1), "scale=-0.1 must be positive and finite."),
    (decode, dict(k=HEADS_FIRST, lengths=ONE * 1.5), "lengths.dtype=float32 must be int32."),
]


@pytest.mark.parametrize("op, call, message", CASES, ids=[m[:60] for _, _, m in CASES])
def test_one_sentence_says_what_is_wrong(op, call, message):
    with pytest.raises(ValueError) as error:
        op(**call)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_traced_scale_is_refused_and_a_traced_layer_is_taken():
    with pytest.raises(ValueError, match="^scale must be a number, not a traced array"):
        jax.eval_shape(lambda scale: attend(scale=scale), 1.0)
    assert jax.eval_shape(lambda layer: attend(layer=layer), 1).out.shape == Q.shape
    with pytest.raises(ValueError, match=r"^layer must be one integer, not float32\[\]."):
        jax.eval_shape(lambda layer: attend(layer=layer), 1.0)


@pytest.mark.parametrize("layer", [1, np.int64(1), np.uint8(1), jnp.int16(1)])
def test_every_kind_of_integer_is_a_layer(layer):
    assert layer_index(layer, 2) == 1


def test_every_kind_of_integer_is_a_table():
    want = attend()
    for dtype in ("int8", "uint32", "int16"):
        got = attend(table=TABLE.astype(dtype), start=ONE.astype(dtype))
        np.testing.assert_array_equal(got.out, want.out)


def test_pools_must_be_as_their_layout_says():
    other = dataclasses.replace(EXACT, arrays=EXACT.arrays | {"v": POOL.astype(jnp.bfloat16)})
    with pytest.raises(ValueError, match="^v.dtype=bfloat16 must be float32.$"):
        attend(pages=other)
    with pytest.raises(ValueError, match="^dtype='int32' must be one of bfloat16, float16, floa"):
        pk.Pages.exact(POOL.astype(jnp.int32), POOL.astype(jnp.int32))
    with pytest.raises(ValueError, match="^dtype='float64' must be one of"):
        Exact("float64")


@pytest.mark.parametrize("name", ["cuda", "rocm", "GPU", ""])
def test_platforms_have_three_names(name):
    with pytest.raises(ValueError, match=f"^platform='{name}' must be one of cpu, gpu, tpu.$"):
        current_platform(name)
    with pytest.raises(ValueError, match=f"^platform='{name}' must be one of cpu, gpu, tpu.$"):
        choose(None, EXACT, q_tokens=1, q_heads=4, platform=name)


def test_parts_of_different_shapes_do_not_merge():
    part = pk.Part(Q, Q[..., 0])
    with pytest.raises(ValueError, match=r"^b.out.shape=\(1, 1, 2, 8\) must be \(1, 1, 4, 8\).$"):
        pk.merge(part, pk.Part(Q[:, :, :2], Q[:, :, :2, 0]))
    with pytest.raises(ValueError, match="^sink_logits.dtype=int32 must be a float type.$"):
        pk.add_learned_sink(part, jnp.zeros(4, jnp.int32))


@pytest.mark.parametrize("page, slot", [(-1, 0), (3, 0), (1, -1), (1, 4)])
def test_places_that_are_not_there_are_not_written(page, slot):
    """Below 0 they counted from the end: another sequence's page."""
    one = lambda x: jnp.full((1, 1), x, jnp.int32)
    where = dict(page=one(page), slot=one(slot), writes=one(1) > 0)
    new = pk.write_pages(EXACT, K + 1, K + 1, layer=0, **where)
    jax.tree.map(np.testing.assert_array_equal, new, EXACT)


@pytest.mark.parametrize("source, target", [(-1, 1), (3, 1), (1, -1), (1, 3)])
def test_pages_that_are_not_there_are_not_quantized(source, target):
    one = lambda x: jnp.full(1, x, jnp.int32)
    exact = pk.Pages.exact(POOL + 1, POOL + 1)
    where = dict(source=one(source), target=one(target), wanted=one(1) > 0)
    new = pk.quantize_pages(coded("int8"), exact, layer=None, **where)
    jax.tree.map(np.testing.assert_array_equal, new, coded("int8"))
