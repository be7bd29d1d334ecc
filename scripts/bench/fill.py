"""Fills pools: with quantized normal keys and values, or with random codes where any will do."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.abstract_cache import abstract_cache
from pallas_kernels.pages import Pages
from pallas_kernels.quantize_pages.xla import quantize_page
from scripts.bench.problems import EXACT_DTYPE, Sizes, chunk_pages


class Data(NamedTuple):
    """The arrays of a case that live on the device."""

    q: jax.Array  # [batch, 1, q_heads, head_dim]
    pages: Pages
    sink_logits: jax.Array | None  # f32[q_heads]


def make_data(sizes: Sizes, key: jax.Array) -> Data:
    """Draws normal keys around a mean of each channel, and normal values; quantizes both if coded.

    One chunk of pages at a time: the float32 numbers of all of them would not fit.
    """
    shape, layout = sizes.workload, sizes.layout
    chunk = chunk_pages(shape, sizes.page_size, sizes.pages)
    q_key, mean_key, sink_key, pages_key = jax.random.split(key, 4)
    channel_mean = jax.random.normal(mean_key, (shape.kv_heads, 1, shape.head_dim))

    def make_chunk(key):
        dims = (chunk, shape.kv_heads, sizes.page_size, shape.head_dim)
        k, v = jax.random.normal(key, (2, *dims))
        k = k + channel_mean[None]
        if layout is None:
            return k.astype(EXACT_DTYPE), v.astype(EXACT_DTYPE)
        mean = layout.codec.key_page_mean(k) if layout.codec.key_mean else None
        return quantize_page(layout, k, v, mean), mean

    chunks = sizes.layers * sizes.pages // chunk
    made = jax.lax.map(make_chunk, jax.random.split(pages_key, chunks))
    made = jax.tree.map(lambda x: x.reshape(sizes.layers, sizes.pages, *x.shape[2:]), made)
    if layout is None:
        pages = Pages.exact(*made)
    else:
        pages = Pages(arrays=made[0], key_mean=made[1], layout=layout)
    q_dims = (sizes.batch, 1, shape.q_heads, shape.head_dim)
    sinks = jax.random.normal(sink_key, (shape.q_heads,)) if shape.learned_sinks else None
    return Data(jax.random.normal(q_key, q_dims).astype(EXACT_DTYPE), pages, sinks)


def exact_pools(data: Data) -> tuple[jax.Array, jax.Array]:
    """Keys and values of exact pages, each `[layers, pages, kv_heads, page_size, head_dim]`."""
    return data.pages.arrays["k"], data.pages.arrays["v"]


def random_data(sizes: Sizes) -> Data:
    """Inputs of the same shapes whose pages hold random codes: quicker to compile and to run."""
    shapes = jax.eval_shape(functools.partial(make_data, sizes), jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.pages)
    normal = lambda x: jax.random.normal(jax.random.key(1), x.shape, jnp.float32).astype(x.dtype)
    sinks = None if shapes.sink_logits is None else normal(shapes.sink_logits)
    return Data(normal(shapes.q), random_pages(zeros), sinks)


def random_pages(pages):
    """The pools, which are donated, full of random codes, factors and values."""
    seeds = itertools.count()

    def fill_one(path, pool):
        # Words of two float16 factors hold small ones; bytes of float8 are finite.
        factors = "factors" in jax.tree_util.keystr(path)
        return _fill_pool(pool, next(seeds), 0x33333333 if factors else 0x77777777)

    return jax.tree.map_with_path(fill_one, pages)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _fill_pool(pool: jax.Array, seed: int, mask: int) -> jax.Array:
    """Random words of the bits of `mask`, or small numbers where the pool has floats."""

    def fill_layer(i, pool):  # in place: a second pool may not fit
        key = jax.random.fold_in(jax.random.key(seed), i)
        if jnp.issubdtype(pool.dtype, jnp.integer):
            bits = jnp.dtype(f"uint{8 * pool.dtype.itemsize}")
            x = jax.random.bits(key, pool.shape[1:], bits) & bits.type(mask & jnp.iinfo(bits).max)
            x = jax.lax.bitcast_convert_type(x, pool.dtype)
        else:
            x = 0.1 * jax.random.normal(key, pool.shape[1:], jnp.bfloat16)
        return jax.lax.dynamic_update_index_in_dim(pool, x.astype(pool.dtype), i, 0)

    return jax.lax.fori_loop(0, pool.shape[0], fill_layer, pool)


def random_cache(config: jaxkv.CacheConfig, context: int) -> jaxkv.KVCache:
    """A cache whose sequences hold `context` tokens of random content.

    No prompt runs: pages are reserved step by step, as `generate` does, then the pools are filled.
    """
    step = config.max_new_tokens

    @functools.partial(jax.jit, donate_argnums=0)
    def reserve(cache):
        left = jnp.minimum(context - cache.lengths, step)
        return cache.prepare(left).commit(left)

    cache = jaxkv.KVCache.create(config)
    for _ in range(-(-context // step)):
        cache = reserve(cache)
    fresh = lambda store: dataclasses.replace(store, pages=random_pages(store.pages))
    return dataclasses.replace(cache, stores=tuple(map(fresh, cache.stores)))


def stored_bytes(config: jaxkv.CacheConfig, context: int) -> int:
    """Bytes of the pages that hold `context` tokens of every sequence, exact ones beside codes
    left out."""
    cache = abstract_cache(config)
    body = [cache.stores[group.stores[-1]] for group in cache.config.groups]
    pages = config.batch * math.ceil(context / config.page_size)
    return sum(pages * store.page_bytes for store in body)
