"""The op `quantize_pages`: checks a call and picks the backend that serves it."""

from types import ModuleType

import jax

from pallas_kernels.backends import Backend, choose_backend
from pallas_kernels.checks import check_bools, check_filled, check_types, int32s, layer_index
from pallas_kernels.layouts.plain import Plain
from pallas_kernels.pages import Pages
from pallas_kernels.quantize_pages import triton, xla
from pallas_kernels.shapes import bind_dims
from pallas_kernels.x32 import in_32_bits

BACKENDS: dict[Backend, ModuleType] = {"xla": xla, "gpu": triton}


@in_32_bits
def quantize_pages(
    coded: Pages,
    exact: Pages,
    *,
    layer: int | jax.Array | None,
    source: jax.Array,
    target: jax.Array,
    wanted: jax.Array,
    backend: Backend | None = None,
) -> Pages:
    """Quantizes page `source[i]` of `exact` into page `target[i]` of `coded` where `wanted[i]`.

    Args:
      coded: pages of codes with as many layers as `exact`; donate them for an update in place.
      exact: pages of values; a wanted page must be complete.
      layer: index into the pools' first axis, static or traced; None for all layers.
      source: `i32[n]`, page ids in `exact`.
      target: `i32[n]`, page ids in `coded`, all different where wanted.
      wanted: `bool[n]`; entries that are not wanted cost nothing. Those with a page that is not
        there never are.
      backend: None picks by platform.

    Returns:
      The new coded pages.

    Raises:
      ValueError: an argument of a wrong type, kind of numbers or shape; a static `layer` that is
        not there.
      NotImplementedError: the named backend does not serve this op.
    """
    check_types(coded=(coded, Pages), exact=(exact, Pages))
    if not coded.coded:
        raise ValueError(f"coded holds {coded.layout.codec.name!r} pages; it must hold codes.")
    if not isinstance(exact.layout, Plain):
        raise ValueError(
            f"exact holds {exact.layout.codec.name!r} pages in {type(exact.layout).__name__}; it "
            "must hold exact pages in Plain."
        )
    check_filled(bind_dims(source=(source, "n"), target=(target, "n"), wanted=(wanted, "n")))
    check_bools(wanted=wanted)
    dims, exact_dims = coded.dims, exact.dims
    for name, size in dims.items():
        if name != "pages" and exact_dims[name] != size:
            raise ValueError(f"{name}={exact_dims[name]} of exact pages must be {size}.")
    source, target = int32s(source=source, target=target)
    # Below 0 an index would count from the end, and a kernel would read or write another page.
    wanted = wanted & (source >= 0) & (source < exact_dims["pages"])
    wanted = wanted & (target >= 0) & (target < dims["pages"])
    layer = None if layer is None else layer_index(layer, dims["layers"])
    serve = BACKENDS[choose(backend, coded)]
    return serve.quantize_pages(
        coded, exact, layer=layer, source=source, target=target, wanted=wanted
    )


def choose(backend: Backend | None, coded: Pages, *, platform: str | None = None) -> Backend:
    """Which backend quantizes into such pages: the named one, or the platform's best.

    Args:
      backend: None picks by platform.
      coded: shapes and dtypes are enough.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the named backend does not serve such pages; the message says why.
    """
    return choose_backend("quantize_pages", backend, BACKENDS, platform, coded=coded)
