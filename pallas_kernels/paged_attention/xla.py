"""Paged attention in plain JAX: the real path on CPU, and the fallback-free twin of the kernels.

A loop over blocks of pages with an online softmax. Its trip count is the number of blocks that
some query can see: cost follows the live length and the window, not the table's width. Coded
pages are attended as codes: the query is rotated once, factors are folded into scores and
probabilities, the output is rotated back once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.pages import CodedPages, ExactPages
from pallas_kernels.visibility import visible

# Keys a loop step, measured on a CPU: a few queries want few steps, a chunk little masked waste.
DECODE_BLOCK, PREFILL_BLOCK = 256, 128
DECODE_TOKENS = 8  # most query tokens that count as decode (with drafts to verify)
# A finite running maximum for rows that have seen nothing, so that no -inf - -inf appears.
NOTHING_SEEN = -1e30


def paged_attention(
    q,
    pages,
    page_table,
    sink_table,
    *,
    layer,
    q_start,
    q_lens,
    kv_start,
    kv_stop,
    sink_span,
    scale,
    window,
    sink_tokens,
    lag,
    soft_cap,
    out_dtype,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`."""
    batch, q_tokens, q_heads, head_dim = q.shape
    kv_heads, page_size = pages.dims["kv_heads"], pages.dims["page_size"]
    group = q_heads // kv_heads
    codec = pages.layout.codec if isinstance(pages, CodedPages) else None
    # [batch, kv_heads, group * q_tokens, head_dim]: all rows that read the same keys, together.
    rows = q.reshape(batch, q_tokens, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * q_tokens, head_dim).astype(jnp.float32) * scale
    rows = rows if codec is None else codec.key.rotate(rows)
    token = jnp.arange(q_tokens, dtype=jnp.int32)[None]
    slot = jnp.arange(page_size, dtype=jnp.int32)[None, None]
    q_position = jnp.where(token < q_lens[:, None], q_start[:, None] + token, -1)
    i = q_position[:, :, None]

    width = page_table.shape[1]
    first = kv_start // page_size
    ring_pages = jnp.where(kv_stop > kv_start, -(-kv_stop // page_size) - first, 0)
    sink_pages = jnp.zeros_like(first)
    if sink_span is not None:
        sink_start, sink_stop = sink_span
        sink_pages = jnp.where(sink_stop > sink_start, -(-sink_stop // page_size), 0)
    if lag is not None and lag.most is not None:  # so few pages can be seen at all
        width = min(width, lag.most + -(-(q_tokens - 1) // page_size))
    most = width + (0 if sink_table is None else sink_table.shape[1])
    block_tokens = DECODE_BLOCK if q_tokens <= DECODE_TOKENS else PREFILL_BLOCK
    block = max(1, min(block_tokens // page_size, most))  # pages a step
    blocks = -(-jnp.max(ring_pages + sink_pages) // block)

    def attend_block(step, state):
        m, l, acc = state
        # Sink pages come first, then the ring's, from the segment's first one on.
        ordinal = step * block + jnp.arange(block, dtype=jnp.int32)[None]
        logical = first[:, None] + ordinal - sink_pages[:, None]
        page = jnp.take_along_axis(page_table, logical % page_table.shape[1], axis=1)
        start, stop = kv_start[:, None], kv_stop[:, None]
        if sink_table is not None:
            is_sink = ordinal < sink_pages[:, None]
            place = jnp.minimum(ordinal, sink_table.shape[1] - 1)
            sink = jnp.take_along_axis(sink_table, jnp.broadcast_to(place, is_sink.shape), axis=1)
            page, logical = jnp.where(is_sink, sink, page), jnp.where(is_sink, ordinal, logical)
            start = jnp.where(is_sink, sink_start[:, None], start)[:, :, None]
            stop = jnp.where(is_sink, sink_stop[:, None], stop)[:, :, None]
        else:
            start, stop = start[:, :, None], stop[:, :, None]
        j = logical[:, :, None] * page_size + slot  # [batch, block, page_size]
        inside = ((j >= start) & (j < stop)).reshape(batch, 1, block * page_size)
        j = j.reshape(batch, 1, block * page_size)
        sees = visible(i, j, window=window, sink_tokens=sink_tokens) & inside & (i >= 0)
        if lag is not None and q_tokens > 1:  # one token's span says it already
            served = lag.serves(i, j)
            if sink_table is not None:
                served |= j < sink_pages[:, None, None] * page_size
            sees &= served

        if isinstance(pages, CodedPages):
            keys, values = _read_codes(pages, layer, page, rows)
        else:
            keys, values = _read_exact(pages, layer, page)
        score = _scores(rows, keys)
        if soft_cap is not None:
            score = soft_cap * jnp.tanh(score / soft_cap)
        # A branch, since most blocks of a long sequence need no mask, and since XLA's CPU code
        # would otherwise work the rule out again, unvectorised, in each of the mask's readers.
        score, values = jax.lax.cond(
            jnp.all(sees), lambda score, values, sees: (score, values), _hide, score, values, sees
        )
        m_new = jnp.maximum(m, jnp.max(score, axis=-1))
        p = jnp.exp(score - m_new[..., None])
        shrink = jnp.exp(m - m_new)
        part = _weighted_sum(p, values)
        return m_new, l * shrink + jnp.sum(p, axis=-1), acc * shrink[..., None] + part

    state = (
        jnp.full(rows.shape[:3], NOTHING_SEEN, jnp.float32),
        jnp.zeros(rows.shape[:3], jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
    )
    if block == most:  # all there can be: no loop
        m, l, acc = attend_block(0, state)
    else:
        m, l, acc = jax.lax.fori_loop(0, blocks, attend_block, state)
    seen = l > 0
    total = jnp.where(seen, l, 1.0)
    lse = jnp.where(seen, m + jnp.log(total), -jnp.inf)
    per_row = (batch, kv_heads, group, q_tokens)
    out = acc / total[..., None]
    out = out if codec is None else codec.value.unrotate(out)
    out = out.reshape(*per_row, head_dim).transpose(0, 3, 1, 2, 4)
    lse = lse.reshape(per_row).transpose(0, 3, 1, 2)
    return out.reshape(q.shape).astype(out_dtype), lse.reshape(q.shape[:3])


class Vectors(NamedTuple):
    """Keys or values of a block: `scale * x + zero`, with a mean's share of scores for keys."""

    x: jax.Array  # exact: f32[batch, kv_heads, tokens, head_dim]; codes: as `PageLayout.gather`
    scale: jax.Array | None = None  # f32[batch, kv_heads, tokens]
    zero: jax.Array | None = None
    bias: jax.Array | None = None  # f32[batch, kv_heads, rows, tokens], added to scores


def _read_exact(pages: ExactPages, layer, page: jax.Array) -> tuple[Vectors, Vectors]:
    """Keys and values of `page`, `i32[batch, block]`."""
    head = jnp.arange(pages.k.shape[2], dtype=jnp.int32)[None, :, None]

    def gather(pool):
        x = pool[layer, page[:, None, :], head]  # [batch, kv_heads, block, page_size, head_dim]
        return Vectors(x.reshape(*x.shape[:2], -1, x.shape[-1]).astype(jnp.float32))

    return gather(pages.k), gather(pages.v)


def _read_codes(
    pages: CodedPages, layer, page: jax.Array, rows: jax.Array
) -> tuple[Vectors, Vectors]:
    """Like `_read_exact`, the codes' levels and their factors apart."""
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
        x = x if layout.dims_first else jnp.swapaxes(x, -1, -2)
        flat = lambda f: None if f is None else f.reshape(*f.shape[:2], -1)
        scale, zero = map(flat, tensor.factor_values(record.factors))
        return Vectors(x, scale, zero, bias)

    return vectors(layout.codec.key, key, bias), vectors(layout.codec.value, value)


def _scores(rows: jax.Array, keys: Vectors) -> jax.Array:
    """`f32[batch, kv_heads, rows, tokens]`."""
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


def _hide(score: jax.Array, values: Vectors, sees: jax.Array) -> tuple[jax.Array, Vectors]:
    """Masks scores that `sees`, `bool[batch, q_tokens, keys]`, forbids, and values nobody sees."""
    group = score.shape[2] // sees.shape[1]
    score = jnp.where(jnp.tile(sees, (1, group, 1))[:, None], score, -jnp.inf)
    used = jnp.any(sees, axis=1)[:, None]  # [batch, 1, keys]

    def hide(x):  # what nobody sees may be NaN, and 0 * NaN is NaN
        if x.ndim == 3:
            return jnp.where(used, x, 0.0)
        if x.ndim == 4:
            return jnp.where(used[..., None], x, 0.0)
        return jnp.where(used.reshape(len(x), 1, x.shape[2], 1, -1), x, 0.0)

    return score, jax.tree.map(hide, values)
