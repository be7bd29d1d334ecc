"""Plain JAX scatters; rows that must not be written are sent out of range and dropped."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.pages import Pages


def refusal(**call) -> None:
    """Serves every call."""
    del call


def write_pages(pages: Pages, k, v, *, layer, page, slot, writes) -> Pages:
    """See `api.write_pages`."""
    page = jnp.where(writes, page, pages.dims["pages"])
    layout, codec = pages.layout, pages.layout.codec
    # [batch, kv_heads, tokens, head_dim], the order of a layout's record.
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    mean: jax.Array | None = pages.means(layer, jnp.zeros((1,), jnp.int32))
    if mean is not None:  # [1, kv_heads, 1, head_dim]
        mean = codec.key.unrotate(mean)[:, :, None]
    packed = layout.pack(codec.key.quantize(k, mean), codec.value.quantize(v))
    arrays = layout.append(pages.arrays, packed, layer, page, slot)
    return dataclasses.replace(pages, arrays=arrays)
