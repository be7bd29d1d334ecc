"""Paged attention in plain JAX: used on CPUs, and wherever no kernel serves a call.

It loops over blocks of pages with an online softmax. The loop runs over the blocks that some query
can see, so its cost depends on the live length and the window, not on the table's width. Coded
pages are attended as codes: the query is rotated once, factors are folded into scores and
probabilities, and the output is rotated back once.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.layouts.plain import Plain
from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import NOTHING_SEEN, Part, Queries, Segment, Spans, seen_spans
from pallas_kernels.shapes import cdiv

# Keys per loop step, measured on a CPU: with a few queries the number of steps matters, with a
# chunk of them the work on masked keys.
DECODE_BLOCK, PREFILL_BLOCK = 256, 128
DECODE_TOKENS = 8  # most query tokens that count as decode (drafts to verify included)


def refusal(**call) -> None:
    """Serves every call."""
    del call


def paged_attention(
    queries: Queries,
    pages: Pages,
    segment: Segment,
    rule: Rule,
    *,
    layer,
    scale,
    soft_cap,
    out_dtype,
) -> Part:
    """See `api.paged_attention`."""
    batch, q_tokens, q_heads, head_dim = queries.q.shape
    kv_heads, page_size = pages.dims["kv_heads"], pages.dims["page_size"]
    group = q_heads // kv_heads
    codec = pages.layout.codec
    # [batch, kv_heads, group * q_tokens, head_dim]: all rows that read the same keys side by side.
    rows = queries.q.reshape(batch, q_tokens, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * q_tokens, head_dim).astype(jnp.float32) * scale
    rows = codec.key.rotate(rows)
    blocks = _plan_blocks(queries, segment, rule, page_size)

    def attend_block(step, state):
        m, l, acc = state
        page, sees = blocks.find(step)
        keys, values = _read(pages, layer, page, rows)
        score = _scores(rows, keys)
        if soft_cap is not None:
            score = soft_cap * jnp.tanh(score / soft_cap)
        # A branch, because most blocks of a long sequence need no mask, and because XLA on CPUs
        # would otherwise recompute the mask, unvectorised, in every operation that uses it.
        whole = jnp.all(sees)
        score, values = jax.lax.cond(
            whole, lambda score, values, sees: (score, values), _hide, score, values, sees
        )
        m_new = jnp.maximum(m, jnp.max(score, axis=-1))
        p = jnp.exp(score - m_new[..., None])
        shrink = jnp.exp(m - m_new)
        part = _weighted_sum(p, values)
        if q_tokens > 1 and not codec.value.always_finite:  # a single query: `_hide` was enough
            part = jax.lax.cond(
                whole | jnp.all(jnp.isfinite(part)),
                lambda part, p, values, sees: part,
                lambda part, p, values, sees: _isolated_sum(p, values, sees),
                *(part, p, values, sees),
            )
        return m_new, l * shrink + jnp.sum(p, axis=-1), acc * shrink[..., None] + part

    state = (
        jnp.full(rows.shape[:3], NOTHING_SEEN, jnp.float32),
        jnp.zeros(rows.shape[:3], jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
    )
    if blocks.only_one:
        m, l, acc = attend_block(0, state)
    else:
        m, l, acc = jax.lax.fori_loop(0, blocks.count, attend_block, state)
    seen = l != 0  # also where a key that is seen made it NaN
    total = jnp.where(seen, l, 1.0)
    lse = jnp.where(seen, m + jnp.log(total), -jnp.inf)
    per_row = (batch, kv_heads, group, q_tokens)
    out = codec.value.unrotate(acc / total[..., None])
    out = out.reshape(*per_row, head_dim).transpose(0, 3, 1, 2, 4)
    lse = lse.reshape(per_row).transpose(0, 3, 1, 2)
    shape = queries.q.shape
    return Part(out.reshape(shape).astype(out_dtype), lse.reshape(shape[:3]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks of pages to read. A sequence's pages are numbered sink pages first, then the run's."""

    queries: Queries
    segment: Segment
    rule: Rule  # for the masks
    spans: Spans
    sink_pages: jax.Array  # i32[batch], number of sink pages that are read
    page_size: int
    pages: int  # pages per block
    count: jax.Array  # i32[], number of blocks
    only_one: bool  # whether one block holds all pages there can be, so that no loop is needed

    def find(self, step) -> tuple[jax.Array, jax.Array]:
        """A block's page ids, `i32[batch, pages]`, and its mask, `bool[batch, q_tokens, entries]`.

        `step` is the block's number; the mask says which query sees which entry.
        """
        segment, run, sinks = self.segment, self.spans.run, self.spans.sinks
        ordinal = step * self.pages + jnp.arange(self.pages, dtype=jnp.int32)[None]
        first = run.start // self.page_size
        logical = first[:, None] + ordinal - self.sink_pages[:, None]
        page = jnp.take_along_axis(segment.table, logical % segment.table.shape[1], axis=1)
        start, stop, pinned = run.start[:, None], run.stop[:, None], 0
        if segment.sinks is not None and sinks is not None:
            is_sink = ordinal < self.sink_pages[:, None]
            place = jnp.minimum(ordinal, segment.sinks.shape[1] - 1)
            place = jnp.broadcast_to(place, is_sink.shape)
            sink = jnp.take_along_axis(segment.sinks, place, axis=1)
            page, logical = jnp.where(is_sink, sink, page), jnp.where(is_sink, ordinal, logical)
            start = jnp.where(is_sink, sinks.start[:, None], start)
            stop = jnp.where(is_sink, sinks.stop[:, None], stop)
            pinned = segment.sinks.shape[1] * self.page_size
        slot = jnp.arange(self.page_size, dtype=jnp.int32)[None, None]
        entry = logical[:, :, None] * self.page_size + slot  # [batch, pages, page_size]
        inside = (entry >= start[:, :, None]) & (entry < stop[:, :, None])
        entry, inside = (x.reshape(len(x), 1, -1) for x in (entry, inside))
        i = self.queries.positions[:, :, None]
        return page, self.rule.seen(i, entry, pinned=pinned) & inside & (i >= 0)


def _plan_blocks(queries: Queries, segment: Segment, rule: Rule, page_size: int) -> Blocks:
    """Cuts the pages that some query sees into blocks."""
    spans = seen_spans(queries, segment, rule, page_size)
    q_tokens, width = queries.q.shape[1], segment.table.shape[1]
    start, stop = spans.run
    run_pages = jnp.where(stop > start, cdiv(stop, page_size) - start // page_size, 0)
    sink_pages = jnp.zeros_like(run_pages)
    if spans.sinks is not None:
        start, stop = spans.sinks
        sink_pages = jnp.where(stop > start, cdiv(stop, page_size), 0)
    if rule.lag is not None and rule.lag.most is not None:
        most_pages = rule.most_pages(q_tokens, page_size)
        assert most_pages is not None
        width = min(width, most_pages)
    most = width + (0 if segment.sinks is None else segment.sinks.shape[1])
    block_tokens = DECODE_BLOCK if q_tokens <= DECODE_TOKENS else PREFILL_BLOCK
    block = max(1, min(block_tokens // page_size, most))
    return Blocks(
        queries=queries,
        segment=segment,
        # For a single query the span already applies the lag.
        rule=rule if q_tokens > 1 else dataclasses.replace(rule, lag=None),
        spans=spans,
        sink_pages=sink_pages,
        page_size=page_size,
        pages=block,
        count=cdiv(jnp.max(run_pages + sink_pages), block),
        only_one=block == most,
    )


class Vectors(NamedTuple):
    """Keys or values of a block, `scale * x + zero`; for keys, also the scores of their mean."""

    # Exact values are f32[batch, kv_heads, tokens, head_dim]. Levels of codes are kept page by page
    # with head_dim before tokens: f32[batch, kv_heads, block, head_dim, page_size].
    x: jax.Array
    scale: jax.Array | None = None  # f32[batch, kv_heads, tokens]
    zero: jax.Array | None = None  # like scale
    bias: jax.Array | None = None  # f32[batch, kv_heads, rows, tokens], added to scores


def _read(pages: Pages, layer, page: jax.Array, rows: jax.Array) -> tuple[Vectors, Vectors]:
    """Reads keys and values of `page`, `i32[batch, block]`: levels of codes and their factors."""
    layout = pages.layout
    key, value = layout.gather(pages.arrays, layer, page)
    bias = None
    mean = pages.means(layer, page)  # [batch, block, kv_heads, head_dim]
    if mean is not None:
        mean = mean.astype(jnp.float32)
        bias = jnp.einsum("bhrd,bnhd->bhrn", rows, mean, precision="highest")
        bias = jnp.repeat(bias, layout.page_size, axis=-1)

    def vectors(tensor, record, bias=None):
        x = tensor.code_values(record.codes)
        if isinstance(layout, Plain):  # tokens of all pages in a row
            x = x.reshape(*x.shape[:2], -1, x.shape[-1])
        elif not layout.dims_first:
            x = jnp.swapaxes(x, -1, -2)
        flat = lambda f: None if f is None else f.reshape(*f.shape[:2], -1)
        scale, zero = map(flat, tensor.factor_values(record.factors))
        return Vectors(x, scale, zero, bias)

    return vectors(layout.codec.key, key, bias), vectors(layout.codec.value, value)


def _scores(rows: jax.Array, keys: Vectors) -> jax.Array:
    """Scores of queries and keys, `f32[batch, kv_heads, rows, tokens]`."""
    if keys.x.ndim == 4:
        score = jnp.einsum("bhrd,bhkd->bhrk", rows, keys.x, precision="highest")
    else:  # [batch, kv_heads, block, head_dim, page_size]
        score = jnp.einsum("bhrd,bhndt->bhrnt", rows, keys.x, precision="highest")
        score = score.reshape(*score.shape[:3], -1)
    score = score if keys.scale is None else score * keys.scale[:, :, None]
    if keys.zero is not None:
        score = score + jnp.sum(rows, axis=-1, keepdims=True) * keys.zero[:, :, None]
    return score if keys.bias is None else score + keys.bias


def _weighted_sum(p: jax.Array, values: Vectors) -> jax.Array:
    """`sum_j p_j v_j`, `f32[batch, kv_heads, rows, head_dim]`."""
    weight = p if values.scale is None else p * values.scale[:, :, None]
    if values.x.ndim == 4:
        out = jnp.einsum("bhrk,bhkd->bhrd", weight, values.x, precision="highest")
    else:  # page by page, so that no axis has to move
        weight = weight.reshape(*weight.shape[:3], values.x.shape[2], -1)
        out = jnp.einsum("bhrnt,bhndt->bhnrd", weight, values.x, precision="highest").sum(axis=2)
    if values.zero is None:
        return out
    return out + jnp.sum(p * values.zero[:, :, None], axis=-1, keepdims=True)


def _isolated_sum(p: jax.Array, values: Vectors, sees: jax.Array) -> jax.Array:
    """`_weighted_sum` where a value that is not finite reaches only the rows that see it.

    There its channel is NaN. As a term of the sum it would reach all rows: 0 * NaN is NaN.
    """
    finite = jnp.isfinite(values.x)
    clean = _weighted_sum(p, values._replace(x=jnp.where(finite, values.x, 0.0)))
    sees = jnp.broadcast_to(_by_row(sees, p.shape[2]), p.shape)
    spoiled = _weighted_sum(sees.astype(jnp.float32), Vectors((~finite).astype(jnp.float32)))
    return jnp.where(spoiled > 0, jnp.nan, clean)


def _by_row(sees: jax.Array, rows: int) -> jax.Array:
    """The mask of query tokens, `bool[batch, q_tokens, keys]`, for the rows of a kv head."""
    return jnp.tile(sees, (1, rows // sees.shape[1], 1))[:, None]


def _hide(score: jax.Array, values: Vectors, sees: jax.Array) -> tuple[jax.Array, Vectors]:
    """Masks scores that `sees`, `bool[batch, q_tokens, keys]`, forbids; zeroes unseen values."""
    score = jnp.where(_by_row(sees, score.shape[2]), score, -jnp.inf)
    used = jnp.any(sees, axis=1)[:, None]  # [batch, 1, keys]

    def hide(x):  # a value that no query sees may be NaN, and 0 * NaN is NaN
        if x.ndim == 3:
            return jnp.where(used, x, 0.0)
        if x.ndim == 4:
            return jnp.where(used[..., None], x, 0.0)
        return jnp.where(used.reshape(len(x), 1, x.shape[2], 1, -1), x, 0.0)

    return score, jax.tree.map(hide, values)
