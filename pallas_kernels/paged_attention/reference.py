"""Gathers the whole segment, dequantized, and applies the formula in float32. For tests."""

import jax
import jax.numpy as jnp

from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.pages import CodedPages, Pages
from pallas_kernels.segments import merge


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
    row = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    q_position = jnp.where(row < q_lens[:, None], q_start[:, None] + row, -1)

    def segment(table, start, stop, lag):
        k, v, k_position = _read(pages, layer, table, start, stop)
        return dense_attention(
            q,
            k,
            v,
            q_position,
            k_position,
            scale=scale,
            window=window,
            sink_tokens=sink_tokens,
            lag=lag,
            soft_cap=soft_cap,
        )

    out, lse = segment(page_table, kv_start, kv_stop, lag)
    if sink_table is not None:
        start, stop = sink_span
        out, lse = merge(out, lse, *segment(sink_table, start, stop, None))
    return out.astype(out_dtype), lse


def _read(pages: Pages, layer, table, start, stop) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, values `[batch, tokens, kv_heads, head_dim]` and positions, -1 outside the segment."""
    page_size, width = pages.dims["page_size"], table.shape[1]
    # The only logical page that a slot of the ring can hold, counting from the segment's first.
    first = (start // page_size)[:, None]
    logical = first + (jnp.arange(width, dtype=jnp.int32)[None] - first) % width
    slot = jnp.arange(page_size, dtype=jnp.int32)[None, None]
    position = (logical[:, :, None] * page_size + slot).reshape(len(table), -1)
    inside = (position >= start[:, None]) & (position < stop[:, None])

    def flatten(x):
        x = jnp.swapaxes(x, 2, 3)
        return x.reshape(x.shape[0], width * page_size, *x.shape[3:])

    k, v = _dequantized(pages, layer, table)
    return flatten(k), flatten(v), jnp.where(inside, position, -1)


def _dequantized(pages: Pages, layer, page) -> tuple[jax.Array, jax.Array]:
    """Keys and values of whole pages as the model would have them, `f32`."""
    if not isinstance(pages, CodedPages):
        return pages.k[layer, page].astype(jnp.float32), pages.v[layer, page].astype(jnp.float32)
    codec = pages.layout.codec
    key, value = pages.layout.unpack({name: x[layer, page] for name, x in pages.arrays.items()})
    k = codec.key.dequantize(key)
    mean = pages.means(layer, page)
    if mean is not None:
        k = k + mean[..., None, :].astype(jnp.float32)
    return codec.key.unrotate(k), codec.value.unrotate(codec.value.dequantize(value))
