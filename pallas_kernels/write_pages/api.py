"""Checks a call and picks who serves it."""

import jax

from pallas_kernels.backends import Backend, choose_backend
from pallas_kernels.shapes import bind_dims
from pallas_kernels.write_pages import xla

BACKENDS: tuple[Backend, ...] = ("xla",)


def write_pages(
    pages: jax.Array,
    x: jax.Array,
    *,
    layer: int | jax.Array,
    page: jax.Array,
    slot: jax.Array,
    writes: jax.Array,
    backend: Backend | None = None,
) -> jax.Array:
    """Stores `x[b, t]` at `pages[layer, page[b, t], :, slot[b, t]]` where `writes[b, t]`.

    Args:
      pages: `[layers, pages, kv_heads, page_size, head_dim]`; donate it for an update in place.
      x: `[batch, tokens, kv_heads, head_dim]`, rounded to the dtype of `pages`.
      layer: index into the first axis of `pages`, static or traced.
      page: `i32[batch, tokens]`, page ids.
      slot: `i32[batch, tokens]`, places in the page.
      writes: `bool[batch, tokens]`; nothing is written elsewhere.
      backend: None picks by platform.

    Returns:
      The new `pages`.

    Raises:
      ValueError: shapes disagree.
      NotImplementedError: the named backend does not serve this op.
    """
    bind_dims(
        pages=(pages, "layers pages kv_heads page_size head_dim"),
        x=(x, "batch tokens kv_heads head_dim"),
        page=(page, "batch tokens"),
        slot=(slot, "batch tokens"),
        writes=(writes, "batch tokens"),
    )
    choose_backend("write_pages", backend, BACKENDS)
    return xla.write_pages(pages, x, layer=layer, page=page, slot=slot, writes=writes)
