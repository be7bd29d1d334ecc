"""A loop over the wanted pages alone: most steps have none, and then it costs nothing."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.pages import CodedPages, ExactPages


def quantize_pages(
    coded: CodedPages, exact: ExactPages, *, layer, source, target, wanted
) -> CodedPages:
    """See `api.quantize_pages`."""
    (order,) = jnp.nonzero(wanted, size=wanted.size, fill_value=0)
    # One entry more than needed: a list of one would make the loop's body invariant, and XLA would
    # hoist it out of a loop that most steps never enter.
    sources, targets = (jnp.append(pages[order], 0) for pages in (source, target))
    # One page of one layer at a time: the code search makes arrays twelve times a page's size.
    layers = coded.dims["layers"] if layer is None else 1

    def quantize_one(i, coded):
        n = i // layers
        own = i % layers if layer is None else layer

        def read(pool):
            start = (own, sources[n]) + (0,) * (pool.ndim - 2)
            return jax.lax.dynamic_slice(pool, start, (1, 1, *pool.shape[2:]))

        def put(pool, x):  # a slice, not a scatter, which a loop on a CPU would copy pools for
            return jax.lax.dynamic_update_slice(pool, x, (own, targets[n]) + (0,) * (pool.ndim - 2))

        k, key_mean = read(exact.k), coded.key_mean
        mean = coded.means(own, jnp.zeros((1, 1), jnp.int32))  # the static one, if there is one
        if coded.layout.codec.key_mean == "page":
            mean = coded.layout.codec.key_page_mean(k)
            key_mean = put(coded.key_mean, mean)
        record = quantize_page(coded.layout, k, read(exact.v), mean)
        arrays = {name: put(coded.arrays[name], x) for name, x in record.items()}
        return dataclasses.replace(coded, arrays=arrays, key_mean=key_mean)

    return jax.lax.fori_loop(0, jnp.sum(wanted, dtype=jnp.int32) * layers, quantize_one, coded)


def quantize_page(layout, k: jax.Array, v: jax.Array, mean: jax.Array | None):
    """Packed arrays of pages `[..., kv_heads, page_size, head_dim]`, with their stored mean."""
    codec = layout.codec
    removed = None if mean is None else codec.key.unrotate(mean)[..., None, :]
    return layout.pack(codec.key.quantize(k, removed), codec.value.quantize(v))
