"""Paged attention in plain JAX: the real path on CPU, and the fallback-free twin of the kernels.

A loop over blocks of pages with an online softmax. Its trip count is the number of blocks that
some query can see: cost follows the live length and the window, not the table's width.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.visibility import visible

BLOCK_TOKENS = 256  # keys a loop step: small enough to waste little, large enough to fill a matmul
# A finite running maximum for rows that have seen nothing, so that no -inf - -inf appears.
NOTHING_SEEN = -1e30


def paged_attention(
    q,
    k_pages,
    v_pages,
    page_table,
    *,
    layer,
    q_start,
    q_lens,
    kv_start,
    kv_stop,
    scale,
    window,
    sink_tokens,
    soft_cap,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`."""
    batch, q_tokens, q_heads, head_dim = q.shape
    _, _, kv_heads, page_size, _ = k_pages.shape
    width = page_table.shape[1]
    group = q_heads // kv_heads
    block = max(1, min(BLOCK_TOKENS // page_size, width))  # pages a step
    # [batch, kv_heads, group * q_tokens, head_dim]: all rows that read the same keys, together.
    rows = q.reshape(batch, q_tokens, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * q_tokens, head_dim).astype(jnp.float32) * scale
    token = jnp.arange(q_tokens, dtype=jnp.int32)[None]
    slot = jnp.arange(page_size, dtype=jnp.int32)[None, None]
    q_position = jnp.where(token < q_lens[:, None], q_start[:, None] + token, -1)

    if window is not None and not sink_tokens:
        kv_start = jnp.maximum(kv_start, q_start - window + 1)
    kv_stop = jnp.minimum(kv_stop, q_start + q_lens)
    first_page = kv_start // page_size
    pages = jnp.where(kv_stop > kv_start, -(-kv_stop // page_size) - first_page, 0)
    blocks = -(-jnp.max(pages) // block)

    def attend_block(step, state):
        m, l, acc = state
        ordinal = step * block + jnp.arange(block, dtype=jnp.int32)
        logical = first_page[:, None] + ordinal[None]  # [batch, block]
        k_position = logical[:, :, None] * page_size + slot
        k_position = k_position.reshape(batch, block * page_size)
        inside = (k_position >= kv_start[:, None]) & (k_position < kv_stop[:, None])
        sees = visible(
            q_position[:, :, None], k_position[:, None, :], window=window, sink_tokens=sink_tokens
        )
        sees = sees & inside[:, None, :] & (q_position >= 0)[:, :, None]

        page = jnp.take_along_axis(page_table, logical % width, axis=1)
        k, v = (_gather(pool, layer, page) for pool in (k_pages, v_pages))
        score = jnp.einsum("bhrd,bhkd->bhrk", rows, k, precision="highest")
        if soft_cap is not None:
            score = soft_cap * jnp.tanh(score / soft_cap)
        mask = sees[:, None, None]  # broadcast over heads and group
        score = score.reshape(batch, kv_heads, group, q_tokens, -1)
        score = jnp.where(mask, score, -jnp.inf)
        m_new = jnp.maximum(m, jnp.max(score, axis=-1))
        p = jnp.exp(score - m_new[..., None])
        shrink = jnp.exp(m - m_new)
        used = jnp.any(sees, axis=1)[:, None, :, None]
        v = jnp.where(used, v, 0.0)  # a page may hold NaN where nobody looks, and 0 * NaN is NaN
        part = jnp.einsum(
            "bhrk,bhkd->bhrd", p.reshape(score.shape[:2] + (-1, p.shape[-1])), v, precision="highest"
        )
        acc = acc * shrink.reshape(batch, kv_heads, -1, 1) + part
        return m_new, l * shrink + jnp.sum(p, axis=-1), acc

    per_row = (batch, kv_heads, group, q_tokens)
    init = (
        jnp.full(per_row, NOTHING_SEEN, jnp.float32),
        jnp.zeros(per_row, jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
    )
    m, l, acc = jax.lax.fori_loop(0, blocks, attend_block, init)
    seen = l > 0
    total = jnp.where(seen, l, 1.0)
    out = acc.reshape(*per_row, head_dim) / total[..., None]
    lse = jnp.where(seen, m + jnp.log(total), -jnp.inf)
    out = out.transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return out, lse.transpose(0, 3, 1, 2).reshape(batch, q_tokens, q_heads)


def _gather(pool: jax.Array, layer: int | jax.Array, page: jax.Array) -> jax.Array:
    """Keys or values of `page`, `i32[batch, block]`, as `f32[batch, kv_heads, tokens, head_dim]`."""
    head = jnp.arange(pool.shape[2], dtype=jnp.int32)[None, :, None]
    x = pool[layer, page[:, None, :], head]  # [batch, kv_heads, block, page_size, head_dim]
    return x.reshape(*x.shape[:2], -1, x.shape[-1]).astype(jnp.float32)
