"""The op `write_pages`: checks a call and picks the backend that serves it."""

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
      pages: pools; donate them for an update in place. Exact pages round values to their dtype;
        coded pages quantize each token by itself, so their codec must not have `key_mean="page"`.
      k: `[batch, tokens, kv_heads, head_dim]`.
      v: like `k`.
      layer: index into the pools' first axis, static or traced.
      page: `i32[batch, tokens]`, page ids.
      slot: `i32[batch, tokens]`, places in the page; no place may be named twice.
      writes: `bool[batch, tokens]`, which tokens are written.
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
    """Which backend writes into such pages: the named one, or the platform's best.

    Args:
      backend: None picks by platform.
      pages: shapes and dtypes are enough.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the named backend does not serve such pages; the message says why.
    """
    return choose_backend("write_pages", backend, BACKENDS, platform, pages=pages)
