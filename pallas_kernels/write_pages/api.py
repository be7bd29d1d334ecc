"""Checks a call and picks who serves it."""

from types import ModuleType

import jax

from pallas_kernels.backends import Backend, choose_backend
from pallas_kernels.pages import Pages
from pallas_kernels.shapes import bind_dims
from pallas_kernels.write_pages import triton, xla

BACKENDS: dict[Backend, ModuleType] = {"xla": xla, "gpu": triton}


def write_pages(
    pages: Pages,
    k: jax.Array,
    v: jax.Array,
    *,
    layer: int | jax.Array,
    page: jax.Array,
    slot: jax.Array,
    writes: jax.Array,
    backend: Backend | None = None,
) -> Pages:
    """Stores token `t` of sequence `b` at slot `slot[b, t]` of page `page[b, t]`.

    Args:
      pages: pools; donate them for an update in place. Exact ones round to their dtype, coded
        ones quantize each token by itself, so they must not have a page mean.
      k: `[batch, tokens, kv_heads, head_dim]`.
      v: like `k`.
      layer: index into the pools' first axis, static or traced.
      page: `i32[batch, tokens]`, page ids.
      slot: `i32[batch, tokens]`, places in the page; no place is written twice.
      writes: `bool[batch, tokens]`; nothing is written elsewhere.
      backend: None picks by platform.

    Returns:
      The new pages.

    Raises:
      ValueError: shapes disagree.
      NotImplementedError: the named backend does not serve such pages.
    """
    sizes = bind_dims(
        k=(k, "batch tokens kv_heads head_dim"),
        v=(v, "batch tokens kv_heads head_dim"),
        page=(page, "batch tokens"),
        slot=(slot, "batch tokens"),
        writes=(writes, "batch tokens"),
    )
    for name in ("kv_heads", "head_dim"):
        if sizes[name] != pages.dims[name]:
            raise ValueError(f"k.shape={k.shape}: {name} must be {pages.dims[name]}.")
    serve = BACKENDS[choose(backend, pages)]
    return serve.write_pages(pages, k, v, layer=layer, page=page, slot=slot, writes=writes)


def choose(backend: Backend | None, pages: Pages, *, platform: str | None = None) -> Backend:
    """Who writes into such pages: the named backend, or the platform's best.

    Args:
      backend: None picks.
      pages: shapes and dtypes are enough.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the named backend does not serve them; says why.
    """
    return choose_backend("write_pages", backend, BACKENDS, platform, pages=pages)
