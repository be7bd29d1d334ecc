"""The op `write_pages`: checks a call and picks the backend that serves it."""

from types import ModuleType

import jax

from pallas_kernels.backends import Backend, choose_backend
from pallas_kernels.checks import (
    check_bools,
    check_filled,
    check_floats,
    check_types,
    int32s,
    layer_index,
)
from pallas_kernels.pages import Pages
from pallas_kernels.shapes import bind_dims
from pallas_kernels.write_pages import triton, xla
from pallas_kernels.x32 import in_32_bits

BACKENDS: dict[Backend, ModuleType] = {"xla": xla, "gpu": triton}


@in_32_bits
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
      writes: `bool[batch, tokens]`, which tokens are written. Those whose page or slot is not there
        never are.
      backend: None picks by platform.

    Returns:
      The new pages.

    Raises:
      ValueError: an argument of a wrong type, kind of numbers or shape; a static `layer` that is
        not there; pages of codes with a mean per page.
      NotImplementedError: the named backend does not serve such pages.
    """
    check_types(pages=(pages, Pages))
    dims, codec = pages.dims, pages.layout.codec
    sizes = bind_dims(
        k=(k, "batch tokens kv_heads head_dim"),
        v=(v, "batch tokens kv_heads head_dim"),
        page=(page, "batch tokens"),
        slot=(slot, "batch tokens"),
        writes=(writes, "batch tokens"),
    )
    check_filled(sizes)
    check_floats(k=k, v=v)
    check_bools(writes=writes)
    for name in ("kv_heads", "head_dim"):
        if sizes[name] != dims[name]:
            raise ValueError(f"k.shape={k.shape}: {name} must be {dims[name]}.")
    if codec.key_mean == "page":
        raise ValueError(
            f"codec={codec.name!r} keeps the mean of a whole page: write tokens into exact pages, "
            "and complete pages by quantize_pages."
        )
    page, slot = int32s(page=page, slot=slot)
    # Below 0 an index would count from the end, and a kernel would write into another page.
    writes = writes & (page >= 0) & (page < dims["pages"])
    writes = writes & (slot >= 0) & (slot < dims["page_size"])
    layer = layer_index(layer, dims["layers"])
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
