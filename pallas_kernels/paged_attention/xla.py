"""Paged attention in plain JAX: the real path on CPU, and the fallback-free twin of the kernels.

A loop over blocks of pages with an online softmax. Its trip count is the number of blocks that
some query can see: cost follows the live length and the window, not the table's width.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.visibility import visible

# Keys a loop step, measured on a CPU: a few queries want few steps, a chunk little masked waste.
DECODE_BLOCK, PREFILL_BLOCK = 256, 128
DECODE_TOKENS = 8  # most query tokens that count as decode (with drafts to verify)
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
    block_tokens = DECODE_BLOCK if q_tokens <= DECODE_TOKENS else PREFILL_BLOCK
    block = max(1, min(block_tokens // page_size, width))  # pages a step
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
    pages = jnp.where((kv_stop > kv_start) & (q_lens > 0), -(-kv_stop // page_size) - first_page, 0)
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
        # A branch, since most blocks of a long sequence need no mask, and since XLA's CPU code
        # would otherwise work the rule out again, unvectorised, in each of the mask's readers.
        score, v = jax.lax.cond(
            jnp.all(sees), lambda score, v, sees: (score, v), _hide, score, v, sees
        )
        m_new = jnp.maximum(m, jnp.max(score, axis=-1))
        p = jnp.exp(score - m_new[..., None])
        shrink = jnp.exp(m - m_new)
        part = jnp.einsum("bhrk,bhkd->bhrd", p, v, precision="highest")
        return m_new, l * shrink + jnp.sum(p, axis=-1), acc * shrink[..., None] + part

    init = (
        jnp.full(rows.shape[:3], NOTHING_SEEN, jnp.float32),
        jnp.zeros(rows.shape[:3], jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
    )
    m, l, acc = jax.lax.fori_loop(0, blocks, attend_block, init)
    seen = l > 0
    total = jnp.where(seen, l, 1.0)
    lse = jnp.where(seen, m + jnp.log(total), -jnp.inf)
    per_row = (batch, kv_heads, group, q_tokens)
    out = (acc / total[..., None]).reshape(*per_row, head_dim).transpose(0, 3, 1, 2, 4)
    lse = lse.reshape(per_row).transpose(0, 3, 1, 2)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _hide(score: jax.Array, v: jax.Array, sees: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masks scores that `sees`, `bool[batch, q_tokens, keys]`, forbids, and values nobody sees."""
    group = score.shape[2] // sees.shape[1]
    score = jnp.where(jnp.tile(sees, (1, group, 1))[:, None], score, -jnp.inf)
    used = jnp.any(sees, axis=1)[:, None, :, None]
    return score, jnp.where(used, v, 0.0)  # it may be NaN, and 0 * NaN is NaN


def _gather(pool: jax.Array, layer: int | jax.Array, page: jax.Array) -> jax.Array:
    """Keys or values of `page`, `i32[batch, block]`: `f32[batch, kv_heads, tokens, head_dim]`."""
    head = jnp.arange(pool.shape[2], dtype=jnp.int32)[None, :, None]
    x = pool[layer, page[:, None, :], head]  # [batch, kv_heads, block, page_size, head_dim]
    return x.reshape(*x.shape[:2], -1, x.shape[-1]).astype(jnp.float32)
