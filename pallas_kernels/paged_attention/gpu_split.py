"""Split-KV for GPUs: equal shares of all pages, whatever the sequences, and the merge of parts.

A static number of splits a sequence leaves most of the chip idle when lengths differ; a whole
number of them, chosen by length, still does when there are about as many sequences as programs run
at once. Here the grid is static and what a program covers is chosen at run time: as nearly as
possible as many pages as every other, of as many sequences as these lie in.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LN2 = 0.6931471805599453
# A finite running maximum for rows that have seen nothing, so that no -inf - -inf appears.
NOTHING_SEEN = -1e30
TRIES = 9  # sizes of whole parts that are tried, from the even share to a sixteenth more
# Least and most parts that are merged in one step. The mean of a sequence's is best; the least is
# larger, as one long sequence among short ones has many.
PARTS_AT_ONCE = 8, 64


class SpanPages(NamedTuple):
    """Pages of a span, counted by ordinals that leave out what stands between sinks and window."""

    first: jax.Array  # logical page of ordinal 0
    pages: jax.Array  # ordinals in use; 0 for an empty span
    head: jax.Array | None = None  # ordinals before the gap
    gap: jax.Array | None = None  # pages left out

    def position(self, token: jax.Array, page_size: int) -> jax.Array:
        """Position of the `token`-th token of the ordinals' pages."""
        shift = self.first * page_size
        if self.gap is not None and self.head is not None:
            shift = shift + jnp.where(token >= self.head * page_size, self.gap * page_size, 0)
        return token + shift


def span_pages(
    q_start: jax.Array,
    kv_start: jax.Array,
    kv_stop: jax.Array,
    *,
    page_size: int,
    window: int | None,
    sink_tokens: int,
    sink_span: tuple[jax.Array, jax.Array] | None = None,
) -> SpanPages:
    """Pages that `kv_start <= j < kv_stop` touches and some query sees; any integer arrays.

    Those of `sink_span`, of a table of sink pages, come first.
    """
    first = kv_start // page_size
    pages = jnp.where(kv_stop > kv_start, pl.cdiv(kv_stop, page_size) - first, 0)
    if sink_span is not None:
        start, stop = sink_span
        head = jnp.where(stop > start, pl.cdiv(stop, page_size), 0)
        return SpanPages(jnp.zeros_like(first), head + pages, head, first - head)
    if window is None or not sink_tokens:
        return SpanPages(first, pages)
    sink_pages = pl.cdiv(sink_tokens, page_size)
    head = jnp.minimum(jnp.maximum(sink_pages - first, 0), pages)
    near = jnp.maximum(q_start - window + 1, kv_start) // page_size
    gap = jnp.minimum(jnp.maximum(near - first - head, 0), pages - head)
    return SpanPages(first, pages - gap, head, gap)


class WorkList(NamedTuple):
    """Which pages each program attends, and where the parts of a sequence are.

    The pages of all sequences stand in a row, and each program has a stretch of it. Sequences that
    have pages are counted by `k`, in order; what program `p` finds in sequence `k` is part `p + k`:
    from one part to the next `p` or `k` grows, so none has two owners, and those of a sequence
    are neighbours.
    """

    low: jax.Array  # i32[programs], first page of a program's stretch
    high: jax.Array  # i32[programs], one past its last
    first: jax.Array  # i32[programs], first sequence `k` of the stretch
    stop: jax.Array  # i32[programs], one past its last
    sequence: jax.Array  # i32[batch], by `k`
    before: jax.Array  # i32[batch], pages of all sequences before `k`
    first_part: jax.Array  # i32[batch]
    part_count: jax.Array  # i32[batch], 0 for a sequence without pages


def plan_work(
    pages: jax.Array, *, programs: int, fewest: int, good_pages: int, least_pages: int
) -> WorkList:
    """Shares pages out evenly among programs, whatever the lengths of sequences.

    Where whole parts of sequences are nearly as even, programs take those: each sequence that one
    begins costs it a start.

    Args:
      pages: `i32[batch]`, pages of each sequence.
      programs: as many as are launched; the last ones may get nothing.
      fewest: programs that fill the chip once; no more where shares would be below `good_pages`.
      good_pages: pages from which on a program's own costs (start, merge) do not matter.
      least_pages: no share is made smaller than this, but the last one and short sequences.
    """
    # Comparisons instead of scans and searches: each is one small fused reduction.
    batch = pages.shape[0]
    b = jnp.arange(batch, dtype=jnp.int32)
    until, used = b[None] <= b[:, None], pages[None] > 0
    count = lambda x: jnp.sum(x, axis=1, dtype=jnp.int32)
    up_to = lambda x: count(jnp.where(until, x[None], 0))
    end, rank = up_to(pages), count(until & used)
    total = jnp.sum(pages)
    even = jnp.maximum(
        pl.cdiv(total, programs), jnp.minimum(good_pages, pl.cdiv(total, min(fewest, programs)))
    )
    even = jnp.maximum(even, least_pages)

    sizes = even + even * jnp.arange(TRIES, dtype=jnp.int32) // (16 * (TRIES - 1))
    fits = count(pl.cdiv(pages[None], sizes[:, None])) <= programs
    is_whole = jnp.any(fits)
    size = jnp.min(jnp.where(fits, sizes, sizes[-1]))
    parts = pl.cdiv(pages, size)
    program = jnp.where(is_whole, up_to(parts) - parts, (end - pages) // even)  # first to see b
    parts = jnp.where(is_whole, parts, jnp.where(pages > 0, (end - 1) // even + 1 - program, 0))

    p = jnp.arange(programs + 1, dtype=jnp.int32)
    done = jnp.clip(p[:, None] - program[None], 0, parts[None])
    of_parts = count(done * pages[None] // jnp.maximum(parts[None], 1))
    edge = jnp.minimum(jnp.where(is_whole, of_parts, p * even), total)
    low, high = edge[:-1], edge[1:]
    earlier = rank[None] <= b[:, None]
    return WorkList(
        low=low,
        high=high,
        first=count(used & (end[None] <= low[:, None])),
        stop=count(used & ((end - pages)[None] < high[:, None])),
        sequence=jnp.minimum(count(earlier), batch - 1),
        before=count(jnp.where(earlier, pages[None], 0)),
        first_part=program + rank - 1,
        part_count=parts,
    )


def program_bound(batch: int, most_pages: int, *, wanted: int, least_pages: int) -> int:
    """Largest number of programs that sequences of `most_pages` may need."""
    return min(wanted, batch * pl.cdiv(most_pages, least_pages))


def _combine_kernel(
    first_ref,  # i32[batch]
    count_ref,  # i32[batch]
    part_ref,  # f32[parts, kv_heads, rows, head_dim]
    lse_ref,  # f32[parts, kv_heads, rows], base 2
    out_ref,  # [batch, q_tokens, q_heads, head_dim]
    out_lse_ref,  # f32[batch, q_tokens, q_heads], natural
    *,
    group: int,
    columns: int,
    block: int,
):
    b, t, head = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    head_dim = out_ref.shape[3]
    h, row = head // group, t * group + head % group
    first, count = first_ref[b], count_ref[b]
    column = jnp.arange(columns, dtype=jnp.int32)
    inside = column < head_dim

    def merge(i, state):
        m, l, acc = state
        rank = i * block + jnp.arange(block, dtype=jnp.int32)
        used = rank < count
        at = first + jnp.where(used, rank, 0)
        lse = plgpu.load(lse_ref.at[at, h, row], mask=used, other=NOTHING_SEEN)
        part = plgpu.load(
            part_ref.at[
                jnp.broadcast_to(at[:, None], (block, columns)),
                h,
                row,
                jnp.broadcast_to(column[None], (block, columns)),
            ],
            mask=used[:, None] & inside[None],
            other=0.0,
        )
        m_new = jnp.maximum(m, jnp.max(lse))
        weight = jnp.where(lse > NOTHING_SEEN, jnp.exp2(lse - m_new), 0.0)
        shrink = jnp.exp2(m - m_new)
        return (
            m_new,
            l * shrink + jnp.sum(weight),
            acc * shrink + jnp.sum(part * weight[:, None], axis=0),
        )

    init = (jnp.float32(NOTHING_SEEN), jnp.float32(0), jnp.zeros((columns,), jnp.float32))
    m, l, acc = jax.lax.fori_loop(0, pl.cdiv(count, block), merge, init)
    total = jnp.where(l > 0, l, 1.0)
    out = (acc * (1.0 / total)).astype(out_ref.dtype)
    plgpu.store(out_ref.at[b, t, head, column], out, mask=inside)
    out_lse_ref[b, t, head] = jnp.where(l > 0, (m + jnp.log2(total)) * LN2, -jnp.inf)


def combine(
    part: jax.Array,
    lse: jax.Array,
    first_part: jax.Array,
    part_count: jax.Array,
    *,
    q_tokens: int,
    group: int,
    out_dtype=jnp.float32,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Merges each sequence's parts by their log-sum-exp.

    Args:
      part: `f32[parts, kv_heads, rows, head_dim]`; row `t * group + g` is query token `t`.
      lse: `f32[parts, kv_heads, rows]`, base 2, `NOTHING_SEEN` for a row that saw nothing.
      first_part: `i32[batch]`.
      part_count: `i32[batch]`, 0 for a sequence whose output is to be 0.
      q_tokens: query tokens.
      group: query heads of a kv head.
      out_dtype: of the result.
      interpret: run on the CPU.

    Returns:
      `[batch, q_tokens, q_heads, head_dim]` and `f32[batch, q_tokens, q_heads]`, natural log.
    """
    batch, q_heads, head_dim = first_part.shape[0], part.shape[1] * group, part.shape[3]
    least, most = PARTS_AT_ONCE
    block = min(most, max(least, pl.next_power_of_2(pl.cdiv(part.shape[0], batch))))
    return pl.pallas_call(
        functools.partial(
            _combine_kernel,
            group=group,
            columns=pl.next_power_of_2(head_dim),
            block=block,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, q_tokens, q_heads, head_dim), out_dtype),
            jax.ShapeDtypeStruct((batch, q_tokens, q_heads), jnp.float32),
        ],
        grid=(q_heads, q_tokens, batch),
        compiler_params=plgpu.CompilerParams(num_warps=1 if block <= 16 else 4, num_stages=2),
        interpret=interpret,
        name="paged_attention_combine",
    )(first_part, part_count, part, lse)
