"""A donated cache is updated in place, however layers are looped, and windows bound its pages."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import CacheConfig, KVCache, LayerSpec
from jaxkv.codecs import get_codec
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.rule import Rule
from tests.helpers import AS_USERS, TOLERANCE

BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE, CHUNK = 2, 6, 3, 64, 64, 48
FULL = LayerSpec(kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32")
WITH_SINKS = LayerSpec(
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    window=22_000,
    sink_tokens=100,
    sink_positions="cache",
    dtype="float32",
)
BIG = CacheConfig(
    layers=(FULL, WITH_SINKS) * 2,
    batch=BATCH,
    max_tokens=24_000,
    max_new_tokens=CHUNK,
    page_size=PAGE,
)


def attend_layer(cache, layer, x):
    """Attends with `x`, `[batch, tokens, q_heads, head_dim]`, as query, key and value at once."""
    number = layer[0] if isinstance(layer, tuple) else cache.config.locate(layer)[0]
    q_sink = x if cache.config.groups[number].spec.q_sink_limit else None
    k = x[:, :, :KV_HEADS]
    cache, out = cache.attend(layer, x, k, k, q_sink=q_sink)
    return cache, x + out


def unrolled(cache, x):
    for layer in range(len(cache.config.layers)):
        cache, x = attend_layer(cache, layer, x)
    return cache, x


def scanned(cache, x):
    """Layers in a `lax.scan` of a traced index, as a model with stacked weights does it."""

    def body(carry, index):
        for number in range(len(carry[0].config.groups)):
            carry = attend_layer(carry[0], (number, index), carry[1])
        return carry, None

    (cache, x), _ = jax.lax.scan(body, (cache, x), jnp.arange(2, dtype=jnp.int32))
    return cache, x


def once(layers, cache, x):
    tokens = jnp.full(BATCH, x.shape[1], jnp.int32)
    cache, x = layers(cache.prepare(tokens), x)
    return cache.commit(tokens), x


def repeated(layers, cache, x):
    """Steps in a `lax.while_loop`, which frees a sequence on the way, as `generate` does."""

    def body(carry):
        step, cache, x = carry
        cache, x = once(layers, cache, x)
        ends = jnp.arange(BATCH, dtype=jnp.int32) == step
        cache = jax.lax.cond(step > 3, lambda c: c.free(ends), lambda c: c, cache)
        return step + 1, cache, x

    return jax.lax.while_loop(lambda carry: carry[0] < 9, body, (jnp.int32(0), cache, x))[1:]


def compile_for(operation, *arguments, config=BIG):
    """Compiles without allocating anything; the cache, the first argument, is donated."""
    cache = jax.eval_shape(lambda: KVCache.create(config))
    return cache, jax.jit(operation, donate_argnums=0).lower(cache, *arguments).compile(AS_USERS)


def assert_in_place(cache, compiled):
    stores = cache.stores
    pools = [pool for store in stores for pool in jax.tree.leaves(store.pages)]
    pool_bytes = sum(math.prod(pages.shape) * pages.dtype.itemsize for pages in pools)
    assert pool_bytes > 256 << 20
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 << 20
    assert memory.alias_size_in_bytes >= pool_bytes, "the output is not the input's memory"
    for pages in pools:
        shape = re.escape(f"[{','.join(map(str, pages.shape))}]")
        copies = re.findall(rf"= \w+{shape}\S* copy\S*\(.*", compiled.as_text())
        assert not copies


@pytest.mark.both_pythons
@pytest.mark.parametrize("tokens", [1, CHUNK])
@pytest.mark.parametrize("layers", [unrolled, scanned])
@pytest.mark.parametrize("steps", [once, repeated])
def test_step_makes_no_copy_of_the_pool(steps, layers, tokens):
    x = jax.ShapeDtypeStruct((BATCH, tokens, Q_HEADS, HEAD_DIM), jnp.float32)
    assert_in_place(*compile_for(functools.partial(steps, layers), x))


def coded(name, recent_pages):
    """BIG with coded pages, and with sequences long enough that its pools of codes are large."""
    codec = dataclasses.replace(get_codec(name), recent_pages=recent_pages)
    wide = dataclasses.replace(WITH_SINKS, codec=codec, window=250_000)
    layers = (dataclasses.replace(FULL, codec=codec), wide) * 2
    return dataclasses.replace(BIG, layers=layers, max_tokens=300_000)


@pytest.mark.parametrize("tokens", [1, CHUNK])
@pytest.mark.parametrize("layers", [unrolled, scanned])
@pytest.mark.parametrize("name, recent_pages", [("tq3", 2), ("4bit_nc", 0), ("fp8_e4m3", 0)])
def test_step_makes_no_copy_of_coded_pools(name, recent_pages, layers, tokens):
    x = jax.ShapeDtypeStruct((BATCH, tokens, Q_HEADS, HEAD_DIM), jnp.float32)
    steps = functools.partial(repeated, layers)
    assert_in_place(*compile_for(steps, x, config=coded(name, recent_pages)))


def test_fork_copies_pages_not_the_pool():
    sequences = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert_in_place(*compile_for(KVCache.fork, sequences, sequences))


def test_free_touches_no_page():
    mask = jax.ShapeDtypeStruct((BATCH,), bool)
    assert_in_place(*compile_for(KVCache.free, mask))


WINDOW, SINKS, STREAM = 64, 4, 5_000
STREAMED = CacheConfig(
    layers=(
        LayerSpec(kv_heads=1, head_dim=8, window=WINDOW, dtype="float32"),
        LayerSpec(kv_heads=1, head_dim=8, window=WINDOW, sink_tokens=SINKS, dtype="float32"),
    ),
    batch=2,
    max_tokens=None,
    page_size=16,
)


@functools.partial(jax.jit, donate_argnames="cache")
def stream(cache, keys):
    """Adds one token per step to sequence 0, and to sequence 1 at every other step.

    Returns the cache, the last outputs, and the pages in use after each step.
    """

    def body(carry):
        step, cache, _, used = carry
        key = keys[cache.lengths][:, None, None]
        cache = cache.prepare(jnp.stack([jnp.int32(1), step % 2]))
        outs = []
        for layer in range(2):
            cache, out = cache.attend(layer, key, key, key)
            outs.append(out[:, 0, 0])
        cache = cache.commit(cache.pending)
        return step + 1, cache, jnp.stack(outs), used.at[step].set(cache.pages_in_use)

    init = (
        jnp.int32(0),
        cache,
        jnp.zeros((2, 2, 8)),
        jnp.zeros((STREAM, 2), jnp.int32),
    )
    return jax.lax.while_loop(lambda carry: carry[0] < STREAM, body, init)[1:]


def test_stream_of_any_length_runs_in_constant_pages():
    keys = np.random.default_rng(0).standard_normal((STREAM, 8), dtype=np.float32)
    cache, outs, used = stream(KVCache.create(STREAMED), keys)
    assert cache.lengths.tolist() == [STREAM, STREAM // 2]
    assert [store.tables.ring.shape[1] for store in cache.stores] == [5, 5]
    assert [store.pages.dims["pages"] for store in cache.stores] == [1 + 2 * 5, 1 + 2 * (5 + 1)]

    # In 32 steps each sequence fills a whole number of pages.
    period = np.asarray(used)[256:-8].reshape(-1, 32, 2)
    np.testing.assert_array_equal(period, np.broadcast_to(period[0], period.shape))
    assert period.max(axis=(0, 1)).tolist() == [2 * 5, 2 * (5 + 1)]

    position = jnp.arange(STREAM, dtype=jnp.int32)[None]
    for layer, spec in enumerate(STREAMED.layers):
        expected, _ = dense_attention(
            keys[None, -1:, None],
            keys[None, :, None],
            keys[None, :, None],
            position[:, -1:],
            position,
            scale=8**-0.5,
            rule=Rule(window=WINDOW, sink_tokens=spec.sink_tokens),
        )
        np.testing.assert_allclose(outs[layer, 0], expected[0, 0, 0], atol=TOLERANCE["float32"])
