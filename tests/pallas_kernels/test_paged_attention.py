"""Every backend of paged attention equals the dense formula, and reads nothing that it must not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import choose_backend
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.pages import ExactPages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Queries, Segment, add_learned_sink
from tests.helpers import TOLERANCE

PAGE, LAYERS, LAYER, KV_HEADS, GROUP, HEAD_DIM = 8, 3, 1, 2, 3, 20
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 45)


# The GPU kernel has test_gpu_decode.py: it serves a few query tokens and other shapes.
@pytest.fixture(params=("xla", "reference"))
def backend(request):
    return request.param


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op; beside them the same keys and values in a row."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    page_table: jax.Array
    where: dict[str, jax.Array]  # q_start, q_lens, kv_start, kv_stop
    k: jax.Array  # [batch, tokens, kv_heads, head_dim]
    v: jax.Array

    def attend(self, *, layer=LAYER, window=None, sink_tokens=0, sink_logits=None, **options):
        where = self.where
        part = paged_attention(
            Queries(self.q, where["q_start"], where["q_lens"]),
            ExactPages(k=self.k_pages, v=self.v_pages),
            Segment(self.page_table, where["kv_start"], where["kv_stop"]),
            Rule(window=window, sink_tokens=sink_tokens),
            layer=layer,
            scale=0.2,
            **options,
        )
        return part if sink_logits is None else add_learned_sink(part, sink_logits)

    def dense(self, *, window=None, sink_tokens=0, **options):
        start, count, first, stop = (
            self.where[name][:, None] for name in ("q_start", "q_lens", "kv_start", "kv_stop")
        )
        row = jnp.arange(self.q.shape[1], dtype=jnp.int32)[None]
        j = jnp.arange(self.k.shape[1], dtype=jnp.int32)[None]
        q_position = jnp.where(row < count, start + row, -1)
        k_position = jnp.where((j >= first) & (j < stop), j, -1)
        rule = Rule(window=window, sink_tokens=sink_tokens)
        return dense_attention(
            self.q, self.k, self.v, q_position, k_position, scale=0.2, rule=rule, **options
        )


def make_case(
    lengths=LENGTHS, *, q_lens=None, kv_start=None, width=7, dtype="float32", poison=np.nan, seed=0
):
    """A case whose pages are shuffled, with `poison` wherever no token of a segment stands.

    Args:
      lengths: `kv_stop` of each sequence; its queries are the newest tokens.
      q_lens: query tokens of each; None for one.
      kv_start: first position of each segment; None for 0.
      width: slots of the page table, a ring.
    """
    rng = np.random.default_rng(seed)
    q_lens = (1,) * len(lengths) if q_lens is None else q_lens
    kv_start = (0,) * len(lengths) if kv_start is None else kv_start
    batch, tokens = len(lengths), max(lengths)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    k, v = (
        np.array(jnp.asarray(normal(batch, tokens, KV_HEADS, HEAD_DIM), dtype), np.float32)
        for _ in range(2)
    )
    free = list(rng.permutation(np.arange(1, 1 + batch * width)))
    pages = np.full((2, LAYERS, 2 + batch * width, KV_HEADS, PAGE, HEAD_DIM), poison, np.float32)
    table = np.full((batch, width), 1 + batch * width, np.int32)  # a page of poison
    table[::2] = 0  # or the null page
    for b, (start, stop) in enumerate(zip(kv_start, lengths, strict=True)):
        for g in range(start // PAGE, -(-stop // PAGE)):
            table[b, g % width] = free.pop()
        for j in range(start, stop):
            page = table[b, j // PAGE % width]
            pages[:, LAYER, page, :, j % PAGE] = k[b, j], v[b, j]
    where = dict(
        q_start=np.subtract(lengths, q_lens), q_lens=q_lens, kv_start=kv_start, kv_stop=lengths
    )
    return Case(
        q=jnp.asarray(normal(batch, max(1, *q_lens), KV_HEADS * GROUP, HEAD_DIM)),
        k_pages=jnp.asarray(pages[0], dtype),
        v_pages=jnp.asarray(pages[1], dtype),
        page_table=jnp.asarray(table),
        where={name: jnp.asarray(x, jnp.int32) for name, x in where.items()},
        k=jnp.asarray(k),
        v=jnp.asarray(v),
    )


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
    part = paged_attention(
        Queries(jnp.full((1, 1, 2, 1), 2.0), one, one),
        ExactPages(k=pages, v=jnp.exp(pages)),  # values 1 and 3
        Segment(jnp.asarray([[1]], jnp.int32), 0 * one, 2 * one),
        Rule(),
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
    """Everything else is NaN: other layers and pages, the null page, what is outside a segment."""
    case, options = make(), dict(window=window, sink_tokens=sink_tokens)
    assert_close(case.attend(**options, backend=backend), case.dense(**options))


def test_soft_cap_and_learned_sinks(backend):
    options = dict(soft_cap=0.7, sink_logits=jnp.linspace(-2, 3, KV_HEADS * GROUP), window=9)
    for make in MAKERS.values():
        case = make()
        assert_close(case.attend(**options, backend=backend), case.dense(**options))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_pages_are_read_exactly(dtype, backend):
    case = CHUNK(dtype=dtype)
    assert_close(case.attend(window=19, backend=backend), case.dense(window=19))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_unread_memory_changes_no_bit(make, backend):
    clean, dirty = make(poison=0), make(poison=np.inf)
    for x, y in zip(clean.attend(backend=backend), dirty.attend(backend=backend), strict=True):
        np.testing.assert_array_equal(x, y)


def test_window_hides_pages_of_the_segment(backend):
    case = make_case()
    behind = case.page_table[4, :4]  # positions 0..31; the query at 44 sees 36..44
    k_pages, v_pages = (x.at[:, behind].set(jnp.nan) for x in (case.k_pages, case.v_pages))
    dirty = dataclasses.replace(case, k_pages=k_pages, v_pages=v_pages)
    assert_close(dirty.attend(window=9, backend=backend), case.dense(window=9))


def test_layer_may_be_traced(backend):
    case = CHUNK()
    attend = jax.jit(lambda layer: case.attend(layer=layer, window=19, backend=backend))
    assert_close(attend(jnp.int32(LAYER)), case.dense(window=19))


def test_rows_that_see_nothing_are_zero_and_minus_infinity(backend):
    case = CHUNK()
    out, lse = case.attend(backend=backend)
    seen = np.arange(13) < np.asarray(case.where["q_lens"])[:, None]
    np.testing.assert_array_equal(np.isfinite(lse).all(-1), seen)
    np.testing.assert_array_equal(np.asarray(lse)[~seen], -np.inf)
    np.testing.assert_array_equal(np.asarray(out)[~seen], 0)
    sinks = jnp.linspace(-1, 1, KV_HEADS * GROUP)
    out, lse = case.attend(sink_logits=sinks, backend=backend)
    np.testing.assert_array_equal(np.asarray(out)[~seen], 0)
    np.testing.assert_array_equal(np.asarray(lse)[~seen], np.tile(sinks, (np.sum(~seen), 1)))


def test_padding_rows_may_hold_anything(backend):
    case = CHUNK()
    padding = np.arange(13) >= np.asarray(case.where["q_lens"])[:, None]
    dirty = dataclasses.replace(case, q=case.q.at[jnp.asarray(padding)].set(jnp.nan))
    for x, y in zip(dirty.attend(backend=backend), case.attend(backend=backend), strict=True):
        np.testing.assert_array_equal(x, y)


def test_empty_segment_gives_nothing(backend):
    case = make_case((5, 9), kv_start=(5, 0))
    out, lse = case.attend(backend=backend)
    np.testing.assert_array_equal(np.isfinite(lse[:, 0]).all(-1), [False, True])
    np.testing.assert_array_equal(out[0], 0)


def test_window_as_long_as_the_sequence_equals_none(backend):
    case = CHUNK()
    whole = case.attend(backend=backend)
    assert_close(case.attend(window=max(LENGTHS), backend=backend), whole)
    assert_close(case.attend(window=1, sink_tokens=max(LENGTHS), backend=backend), whole)


def test_minus_infinite_sinks_equal_none(backend):
    case = CHUNK()
    sinks = jnp.full(KV_HEADS * GROUP, -jnp.inf)
    with_sinks = case.attend(sink_logits=sinks, backend=backend)
    for x, y in zip(with_sinks, case.attend(backend=backend), strict=True):
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
    assert_close(case.attend(window=333, backend=backend), case.dense(window=333))


def test_bad_shapes_name_the_value():
    case = make_case()
    with pytest.raises(ValueError, match=r"^page_table.shape=\(4, 7\): batch must be 5.$"):
        dataclasses.replace(case, page_table=case.page_table[:4]).attend()
    with pytest.raises(ValueError, match=r"^q.shape=\(5, 6, 20\) must be \[batch, q_tokens, "):
        dataclasses.replace(case, q=case.q[:, 0]).attend()
    with pytest.raises(ValueError, match=r"^sink_logits.shape=\(1,\) must be \(6,\).$"):
        case.attend(sink_logits=jnp.zeros(1))


def test_backend_is_named_or_chosen():
    served = ("xla", "reference")
    assert choose_backend("op", None, served, platform="tpu") == "xla"
    assert choose_backend("op", None, (*served, "gpu"), platform="gpu") == "gpu"
    assert choose_backend("op", "reference", served) == "reference"
    with pytest.raises(NotImplementedError, match="^op has no 'tpu' backend; it runs on: xla, "):
        choose_backend("op", "tpu", served)
    with pytest.raises(ValueError, match="^backend='cuda' must be one of xla, reference, gpu, tpu"):
        choose_backend("op", "cuda", served)
