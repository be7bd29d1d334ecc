"""Plain JAX: a loop over wanted pages only; it costs next to nothing in steps that have none."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.pages import Pages

# Pages that one turn of the loop quantizes. In the CPU's layout a turn takes one page: the code
# search makes arrays of twelve times a page's size, which then fit into the CPU's cache.
BLOCK = 32


def refusal(**call) -> None:
    """Serves every call."""
    del call


def quantize_pages(coded: Pages, exact: Pages, *, layer, source, target, wanted) -> Pages:
    """See `api.quantize_pages`."""
    one_by_one = coded.layout.dims_first
    block = 1 if one_by_one else BLOCK
    layers = coded.dims["layers"] if layer is None else 1
    count = jnp.sum(wanted, dtype=jnp.int32) * layers
    (order,) = jnp.nonzero(wanted, size=wanted.size, fill_value=0)
    # The lists are padded by one entry: with a single entry the loop's body would be invariant, and
    # XLA would hoist it out of a loop that most steps never enter.
    sources, targets = (jnp.append(pages[order], 0) for pages in (source, target))

    def quantize_block(i, coded):
        item = i * block + jnp.arange(block, dtype=jnp.int32)
        n = item // layers
        own = item % layers if layer is None else jnp.broadcast_to(layer, item.shape)
        target = jnp.where(item < count, targets[n], coded.dims["pages"])

        def read(pool):
            if not one_by_one:
                return pool[own, sources[n]]
            start = (own[0], sources[n[0]]) + (0,) * (pool.ndim - 2)
            return jax.lax.dynamic_slice(pool, start, (1, 1, *pool.shape[2:]))[0]

        def put(pool, x):
            if not one_by_one:
                return pool.at[own, target].set(x, mode="drop")
            start = (own[0], target[0]) + (0,) * (pool.ndim - 2)
            return jax.lax.dynamic_update_slice(pool, x[None], start)

        k, key_mean = (
            read(exact.arrays["k"]),
            coded.key_mean,
        )  # [block, kv_heads, page_size, head_dim]
        mean = None
        if coded.layout.codec.key_mean == "page":
            mean = coded.layout.codec.key_page_mean(k)
            key_mean = put(coded.key_mean, mean)
        elif key_mean is not None:  # a static mean
            mean = key_mean[own, 0]
        record = quantize_page(coded.layout, k, read(exact.arrays["v"]), mean)
        arrays = {name: put(coded.arrays[name], x) for name, x in record.items()}
        return dataclasses.replace(coded, arrays=arrays, key_mean=key_mean)

    return jax.lax.fori_loop(0, -(-count // block), quantize_block, coded)


def quantize_page(layout, k: jax.Array, v: jax.Array, mean: jax.Array | None):
    """Quantizes and packs pages `[..., kv_heads, page_size, head_dim]`; `mean` as it is stored."""
    codec = layout.codec
    removed = None if mean is None else codec.key.unrotate(mean)[..., None, :]
    return layout.pack(codec.key.quantize(k, removed), codec.value.quantize(v))
