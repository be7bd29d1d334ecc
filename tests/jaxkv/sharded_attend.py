"""Checks on two virtual devices that `attend` with split kv heads equals the unsharded result.

test_shard_map.py runs this file in a process of its own.

Usage: python -m tests.jaxkv.sharded_attend CODEC
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxkv import CacheConfig, KVCache, LayerSpec

LAYERS, BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, MOST_TOKENS = 2, 2, 8, 4, 64, 9
STEPS = (MOST_TOKENS, 1, 1, MOST_TOKENS, MOST_TOKENS, 1, MOST_TOKENS)


def attend(cache, q, k, v, sink_logits):
    out = None
    for layer in range(LAYERS):
        cache, out = cache.attend(layer, q, k, v, sink_logits=sink_logits)
    return cache, out


def cache_specs(cache: KVCache) -> KVCache:
    """Pools are split over their heads; tables, allocators and lengths are whole on each device."""
    specs = jax.tree.map(lambda _: P(), cache)
    stores = []
    for store, spec in zip(cache.stores, specs.stores, strict=True):
        arrays = {}
        for name, axis in store.pages.layout.head_axes.items():
            place = [None] * store.pages.arrays[name].ndim
            place[axis] = "heads"
            arrays[name] = P(*place)
        mean = None if store.pages.key_mean is None else P(None, None, "heads")
        pages = dataclasses.replace(spec.pages, arrays=arrays, key_mean=mean)
        stores.append(dataclasses.replace(spec, pages=pages))
    return dataclasses.replace(specs, stores=tuple(stores))


def main(codec: str):
    spec = LayerSpec(
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        window=20,
        sink_tokens=3,
        codec=codec,
        dtype="float32",
    )
    config = CacheConfig(
        layers=(spec,) * LAYERS,
        batch=BATCH,
        max_tokens=64,
        max_new_tokens=MOST_TOKENS,
        page_size=8,
    )
    whole = split = KVCache.create(config)
    # A prepared cache is another kind of pytree than one between steps.
    prepared = jax.eval_shape(lambda: whole.prepare(jnp.zeros(BATCH, jnp.int32)))
    specs, heads = cache_specs(prepared), P(None, None, "heads")
    mesh = Mesh(np.array(jax.devices()), ("heads",))
    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(specs, heads, heads, heads, P("heads")),
        out_specs=(specs, heads),
        check_vma=False,  # a store's `reads` comes from each device's own heads
    )
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    unsharded, sharded = jax.jit(attend), jax.jit(sharded)
    for tokens in STEPS:
        count = jnp.asarray([tokens, max(1, tokens - 2)], jnp.int32)
        q = normal(BATCH, tokens, Q_HEADS, HEAD_DIM)
        k, v = (normal(BATCH, tokens, KV_HEADS, HEAD_DIM) for _ in range(2))
        sinks = normal(Q_HEADS)
        whole, want = unsharded(whole.prepare(count), q, k, v, sinks)
        split, got = sharded(split.prepare(count), q, k, v, sinks)
        # The same arithmetic for each head: only the order of sums may differ.
        np.testing.assert_allclose(got, want, atol=2e-6)
        whole, split = whole.commit(count), split.commit(count)
        np.testing.assert_array_equal(whole.lengths, split.lengths)
    pools = split.stores[-1].pages.arrays
    assert all(len(x.sharding.device_set) == 2 for x in pools.values())
    print("equal on", len(jax.devices()), "devices")


if __name__ == "__main__":
    main(sys.argv[1])
