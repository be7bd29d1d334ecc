"""Scatters; rows that must not be written are sent out of range and dropped."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.pages import CodedPages, ExactPages, Pages


def write_pages(pages, k, v, *, layer, page, slot, writes) -> Pages:
    """See `api.write_pages`."""
    page = jnp.where(writes, page, pages.dims["pages"])
    if isinstance(pages, CodedPages):
        layout = pages.layout
        # [batch, kv_heads, tokens, head_dim], as layouts have it.
        mean = pages.means(layer, jnp.zeros((1,), jnp.int32))
        if mean is not None:  # [1, kv_heads, 1, head_dim]
            mean = layout.codec.key.unrotate(mean)[:, :, None]
        key = layout.codec.key.quantize(jnp.swapaxes(k, 1, 2), mean)
        value = layout.codec.value.quantize(jnp.swapaxes(v, 1, 2))
        packed = layout.pack(key, value)
        arrays = layout.append(pages.arrays, packed, layer, page, slot)
        return dataclasses.replace(pages, arrays=arrays)
    write = lambda pool, x: pool.at[layer, page, :, slot].set(x.astype(pool.dtype), mode="drop")
    return ExactPages(k=write(pages.k, k), v=write(pages.v, v))
