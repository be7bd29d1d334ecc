"""One scatter; rows that must not be written are sent out of range and dropped."""

import jax
import jax.numpy as jnp


def write_pages(pages, x, *, layer, page, slot, writes) -> jax.Array:
    """See `api.write_pages`."""
    page = jnp.where(writes, page, pages.shape[1])
    return pages.at[layer, page, :, slot].set(x.astype(pages.dtype), mode="drop")
