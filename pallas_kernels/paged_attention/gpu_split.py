"""Split-KV for GPUs: a flat list of work items that follows real lengths, and the merge of parts.

A static number of splits a sequence leaves most of the chip idle when lengths differ. Here the
grid is static and what an item covers is chosen at run time: all items have nearly the same
number of pages, so a long sequence gets many of them and an empty one none.
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
SIZES = 65  # sizes of an item that are tried, from the mean to twice it
PARTS_AT_ONCE = 4, 64  # least and most that are merged in one step: near a sequence's mean


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
    """What each program does, and which parts belong to a sequence."""

    sequence: jax.Array  # i32[items]
    start: jax.Array  # i32[items], first ordinal page
    stop: jax.Array  # i32[items], one past the last; equal to start for an item left over
    first_item: jax.Array  # i32[batch]
    item_count: jax.Array  # i32[batch]


def plan_items(
    pages: jax.Array,
    *,
    items: int,
    wanted: int,
    fewest: int,
    good_pages: int,
    least_pages: int,
    one_wave: bool = False,
) -> WorkList:
    """Cuts sequences into items of nearly equal length.

    Args:
      pages: `i32[batch]`, pages of each sequence.
      items: static length of the list, as `item_bound` says.
      wanted: items to come close to if there are enough pages.
      fewest: items that fill the chip once; no more where items would be shorter than good_pages.
      good_pages: pages from which on an item's own costs (start, merge) do not matter.
      least_pages: an item of a longer sequence has no fewer.
      one_wave: make `wanted` a bound, for kernels that lose more by a second wave of programs than
        by items of unequal length.
    """
    batch = pages.shape[0]
    total = jnp.sum(pages)
    size = jnp.maximum(
        pl.cdiv(total, wanted), jnp.minimum(good_pages, pl.cdiv(total, min(fewest, wanted)))
    )
    if one_wave:
        # Each sequence rounds up, so the search goes on to twice the mean.
        sizes = size + size * jnp.arange(SIZES, dtype=jnp.int32) // (SIZES - 1)
        needed = jnp.sum(pl.cdiv(pages[None], jnp.maximum(sizes, 1)[:, None]), axis=1)
        size = jnp.min(jnp.where(needed <= wanted, sizes, sizes[-1]))
    size = jnp.maximum(size, least_pages)
    count = pl.cdiv(pages, size)
    # Comparisons instead of a scan and a search: each is one small fused reduction.
    row = jnp.arange(batch, dtype=jnp.int32)
    stop = jnp.sum(jnp.where(row[None] <= row[:, None], count[None], 0), axis=1, dtype=jnp.int32)
    item = jnp.arange(items, dtype=jnp.int32)
    sequence = jnp.sum(stop[None] <= item[:, None], axis=1, dtype=jnp.int32)
    in_use = sequence < batch
    sequence = jnp.minimum(sequence, batch - 1)
    first_item = stop - count
    rank = item - first_item[sequence]
    parts = jnp.maximum(count[sequence], 1)
    bound = lambda k: pages[sequence] * k // parts
    return WorkList(
        sequence=sequence,
        start=jnp.where(in_use, bound(rank), 0),
        stop=jnp.where(in_use, bound(rank + 1), 0),
        first_item=first_item,
        item_count=count,
    )


def item_bound(batch: int, most_pages: int, *, wanted: int, least_pages: int, **_) -> int:
    """Largest number of items that `plan_items` may need for sequences of `most_pages`."""
    return min(batch + wanted, batch * pl.cdiv(most_pages, least_pages))


def _combine_kernel(
    first_ref,  # i32[batch]
    count_ref,  # i32[batch]
    part_ref,  # f32[items, kv_heads, rows, head_dim]
    lse_ref,  # f32[items, kv_heads, rows], base 2
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
        item = first + jnp.where(used, rank, 0)
        lse = plgpu.load(lse_ref.at[item, h, row], mask=used, other=NOTHING_SEEN)
        part = plgpu.load(
            part_ref.at[
                jnp.broadcast_to(item[:, None], (block, columns)),
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
    first_item: jax.Array,
    item_count: jax.Array,
    *,
    q_tokens: int,
    group: int,
    out_dtype=jnp.float32,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Merges each sequence's parts by their log-sum-exp.

    Args:
      part: `f32[items, kv_heads, rows, head_dim]`; row `t * group + g` is query token `t`.
      lse: `f32[items, kv_heads, rows]`, base 2, `NOTHING_SEEN` for a row that saw nothing.
      first_item: `i32[batch]`.
      item_count: `i32[batch]`.
      q_tokens: query tokens.
      group: query heads of a kv head.
      out_dtype: of the result.
      interpret: run on the CPU.

    Returns:
      `[batch, q_tokens, q_heads, head_dim]` and `f32[batch, q_tokens, q_heads]`, natural log.
    """
    batch, q_heads, head_dim = first_item.shape[0], part.shape[1] * group, part.shape[3]
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
    )(first_item, item_count, part, lse)
