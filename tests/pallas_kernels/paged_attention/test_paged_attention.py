"""Every backend of paged attention equals the dense formula, and reads nothing that it must not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, Queries, Segment, add_learned_sink
from tests.helpers import TOLERANCE
from tests.pallas_kernels.paged_attention import paged_cases
from tests.pallas_kernels.paged_attention.paged_cases import LAYER

PAGE, KV_HEADS, GROUP = 8, 2, 3
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 45)


# The GPU kernel's tests are in `triton/`, because it serves other shapes.
@pytest.fixture(params=("xla", "reference"))
def backend(request):
    return request.param


def make_case(lengths=LENGTHS, *, store="float32", width=7, **options):
    shape = dict(page_size=PAGE, kv_heads=KV_HEADS, group=GROUP, head_dim=20)
    return paged_cases.make_case(store, lengths=lengths, width=width, **shape, **options)


CHUNK = functools.partial(make_case, q_lens=(1, 5, 0, 3, 13))
# Segments that begin in a later page, some in the middle of one, and wrap around a short ring.
WRAPPED = functools.partial(
    make_case, (7, 29, 41, 24), q_lens=(3, 1, 4, 0), kv_start=(0, 11, 24, 9), width=3
)
MAKERS = {"decode": make_case, "chunk": CHUNK, "wrapped": WRAPPED}


def assert_close(got, expected, tolerance=TOLERANCE["float32"]):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


def test_two_keys_by_hand(backend):
    pages = jnp.zeros((1, 2, 1, 2, 1)).at[0, 1, 0, :, 0].set(jnp.asarray([0.0, np.log(3.0)]))
    one = jnp.asarray([1], jnp.int32)
    part = paged_cases.attend_op(
        Queries(jnp.full((1, 1, 2, 1), 2.0), one, one),
        Pages.exact(pages, jnp.exp(pages)),  # values 1 and 3
        Segment(jnp.asarray([[1]], jnp.int32), 0 * one, 2 * one),
        layer=0,
        scale=0.5,
        backend=backend,
    )
    out, lse = add_learned_sink(part, jnp.log(jnp.asarray([4.0, 0.0])))
    np.testing.assert_allclose(out[0, 0, :, 0], [10 / 8, 10 / 4], rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0], np.log([8, 4]), rtol=1e-6)


@pytest.mark.parametrize("window, sink_tokens", [(None, 0), (1, 0), (5, 0), (19, 0), (6, 3)])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_paged_equals_dense(make, window, sink_tokens, backend):
    """All that must not be read is NaN: other layers and pages, tokens outside the segment."""
    case, rule = make(), Rule(window=window, sink_tokens=sink_tokens)
    assert_close(case.attend(rule, backend=backend), case.dense(rule))


@pytest.mark.parametrize("window", [None, 20])
def test_entries_that_stand_for_several_tokens(window, backend):
    """Keys are entries of three tokens, complete with the last of them; queries are tokens."""
    case, rule = CHUNK(), Rule(window=window, stride=3)
    queries = dataclasses.replace(case.queries, start=3 * case.queries.start + 1)
    case = dataclasses.replace(case, queries=queries)
    assert_close(case.attend(rule, backend=backend), case.dense(rule))


def test_soft_cap_and_learned_sinks(backend):
    rule, sinks = Rule(window=9), jnp.linspace(-2, 3, KV_HEADS * GROUP)
    for make in MAKERS.values():
        case = make()
        part = case.attend(rule, soft_cap=0.7, backend=backend)
        assert_close(
            add_learned_sink(part, sinks), case.dense(rule, soft_cap=0.7, sink_logits=sinks)
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_pages_are_read_exactly(dtype, backend):
    case = CHUNK(store=dtype)
    assert_close(case.attend(Rule(window=19), backend=backend), case.dense(Rule(window=19)))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_unread_memory_changes_no_bit(make, backend):
    clean, dirty = make(poison=0), make(poison=np.inf)
    for x, y in zip(clean.attend(backend=backend), dirty.attend(backend=backend), strict=True):
        np.testing.assert_array_equal(x, y)


def test_window_hides_pages_of_the_segment(backend):
    case = make_case()
    behind = case.segment.table[4, :4]  # positions 0..31; the query at 44 sees 36..44
    pages = jax.tree.map(lambda x: x.at[:, behind].set(jnp.nan), case.pages)
    dirty = dataclasses.replace(case, pages=pages)
    assert_close(dirty.attend(Rule(window=9), backend=backend), case.dense(Rule(window=9)))


def test_layer_may_be_traced(backend):
    case = CHUNK()
    attend = functools.partial(
        paged_cases.call_op, *case.arguments, Rule(window=19), backend=backend
    )
    got = jax.jit(lambda layer: attend(layer=layer))(jnp.int32(LAYER))
    assert_close(got, case.dense(Rule(window=19)))


def test_rows_that_see_nothing_are_zero_and_minus_infinity(backend):
    case = CHUNK()
    part = case.attend(backend=backend)
    out, lse = part
    seen = np.arange(13) < np.asarray(case.queries.lens)[:, None]
    np.testing.assert_array_equal(np.isfinite(lse).all(-1), seen)
    np.testing.assert_array_equal(np.asarray(lse)[~seen], -np.inf)
    np.testing.assert_array_equal(np.asarray(out)[~seen], 0)
    sinks = jnp.linspace(-1, 1, KV_HEADS * GROUP)
    out, lse = add_learned_sink(part, sinks)
    np.testing.assert_array_equal(np.asarray(out)[~seen], 0)
    np.testing.assert_array_equal(np.asarray(lse)[~seen], np.tile(sinks, (np.sum(~seen), 1)))


def test_padding_rows_may_hold_anything(backend):
    case = CHUNK()
    padding = np.arange(13) >= np.asarray(case.queries.lens)[:, None]
    q = case.queries.q
    assert np.isnan(q[padding]).all()
    queries = dataclasses.replace(case.queries, q=q.at[jnp.asarray(padding)].set(0))
    clean = dataclasses.replace(case, queries=queries)
    for x, y in zip(case.attend(backend=backend), clean.attend(backend=backend), strict=True):
        np.testing.assert_array_equal(x, y)


def test_empty_segment_gives_nothing(backend):
    case = make_case((5, 9), kv_start=(5, 0))
    out, lse = case.attend(backend=backend)
    np.testing.assert_array_equal(np.isfinite(lse[:, 0]).all(-1), [False, True])
    np.testing.assert_array_equal(out[0], 0)


def test_window_as_long_as_the_sequence_equals_none(backend):
    case = CHUNK()
    whole = case.attend(backend=backend)
    assert_close(case.attend(Rule(window=max(LENGTHS)), backend=backend), whole)
    assert_close(case.attend(Rule(window=1, sink_tokens=max(LENGTHS)), backend=backend), whole)


def test_minus_infinite_sinks_equal_none(backend):
    case = CHUNK()
    sinks = jnp.full(KV_HEADS * GROUP, -jnp.inf)
    part = case.attend(backend=backend)
    for x, y in zip(add_learned_sink(part, sinks), part, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "lengths, q_lens",
    [
        ((300, 601, 5), (2, 4, 1)),
        ((601, 577), (4, 4)),  # whole blocks that every row sees, in decode and in prefill
        ((601, 577), (13, 13)),
    ],
)
def test_long_segments_take_several_blocks(lengths, q_lens, backend):
    case = make_case(lengths, q_lens=q_lens, width=76)
    assert_close(case.attend(backend=backend), case.dense())
    assert_close(case.attend(Rule(window=333), backend=backend), case.dense(Rule(window=333)))


def test_bad_shapes_name_the_value():
    case = make_case()
    queries, pages, segment = case.arguments
    with pytest.raises(ValueError, match=r"^page_table.shape=\(4, 7\): batch must be 5.$"):
        table = dataclasses.replace(segment, table=segment.table[:4])
        paged_cases.call_op(queries, pages, table)
    with pytest.raises(ValueError, match=r"^q.shape=\(5, 6, 20\) must be \[batch, q_tokens, "):
        one = dataclasses.replace(queries, q=queries.q[:, 0])
        paged_cases.call_op(one, pages, segment)
    with pytest.raises(ValueError, match=r"^sink_logits.shape=\(1,\) must be \(6,\).$"):
        add_learned_sink(Part(queries.q, queries.q[..., 0]), jnp.zeros(1))
