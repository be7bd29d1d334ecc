"""The op `quantize_pages`: checks a call and picks the backend that serves it."""

from types import ModuleType

import jax

from pallas_kernels.backends import Backend, choose_backend
from pallas_kernels.pages import Pages
from pallas_kernels.quantize_pages import triton, xla
from pallas_kernels.shapes import bind_dims

BACKENDS: dict[Backend, ModuleType] = {"xla": xla, "gpu": triton}


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
      wanted: `bool[n]`; entries that are not wanted cost nothing.
      backend: None picks by platform.

    Returns:
      The new coded pages.

    Raises:
      ValueError: shapes disagree.
      NotImplementedError: the named backend does not serve this op.
    """
    bind_dims(source=(source, "n"), target=(target, "n"), wanted=(wanted, "n"))
    for name, size in coded.dims.items():
        if name != "pages" and exact.dims[name] != size:
            raise ValueError(f"{name}={exact.dims[name]} of exact pages must be {size}.")
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
