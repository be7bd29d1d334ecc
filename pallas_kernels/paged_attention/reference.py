"""Gathers the whole segment and applies the formula in float32. Slow; for tests."""

import jax
import jax.numpy as jnp

from pallas_kernels.dense_attention import dense_attention


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
    batch, width = page_table.shape
    page_size = k_pages.shape[3]
    # The only logical page that a slot of the ring can hold, counting from the segment's first.
    first = (kv_start // page_size)[:, None]
    logical = first + (jnp.arange(width, dtype=jnp.int32)[None] - first) % width
    slot = jnp.arange(page_size, dtype=jnp.int32)[None, None]
    k_position = logical[:, :, None] * page_size + slot
    k_position = k_position.reshape(batch, -1)
    inside = (k_position >= kv_start[:, None]) & (k_position < kv_stop[:, None])
    row = jnp.arange(q.shape[1], dtype=jnp.int32)[None]

    def flatten(pages):
        x = jnp.swapaxes(pages[layer, page_table], 2, 3)  # [batch, width, page_size, heads, dim]
        return x.reshape(batch, width * page_size, *x.shape[3:])

    return dense_attention(
        q,
        flatten(k_pages),
        flatten(v_pages),
        jnp.where(row < q_lens[:, None], q_start[:, None] + row, -1),
        jnp.where(inside, k_position, -1),
        scale=scale,
        window=window,
        sink_tokens=sink_tokens,
        soft_cap=soft_cap,
    )
