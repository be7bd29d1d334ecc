"""Builders that tests share: a cache driven beside the plain history it stands for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import CacheConfig, KVCache
from pallas_kernels.dense_attention import dense_attention

# Largest difference to the float32 oracle, by the dtype of the pages: rounding of K and V.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def poison_unread(cache: KVCache) -> KVCache:
    """Returns the cache with NaN wherever no live token stands: free pages, tails, null page."""
    size = cache.config.page_size
    lengths = np.asarray(cache.lengths)
    groups = []
    for spec, state in zip(cache.config.groups, cache.groups, strict=True):
        live = np.zeros((spec.pages, size), bool)
        ring, sinks = np.asarray(state.tables.ring), np.asarray(state.tables.sinks)
        for b, length in enumerate(lengths):
            oldest = 0 if spec.spec.window is None else max(0, length - spec.spec.window + 1)
            for j in range(length):
                page = j // size
                if page < spec.sink_pages:
                    live[sinks[b, page], j % size] |= True
                elif j >= oldest:
                    live[ring[b, page % spec.table_width], j % size] = True
        assert not live[0].any(), "the null page holds live tokens"
        hide = ~live[None, :, None, :, None]
        groups.append(
            dataclasses.replace(
                state, k_pages=_poison(state.k_pages, hide), v_pages=_poison(state.v_pages, hide)
            )
        )
    return dataclasses.replace(cache, groups=tuple(groups))


def _poison(pages: jax.Array, hide: np.ndarray) -> jax.Array:
    return jnp.asarray(np.where(hide, np.asarray(np.nan, pages.dtype), np.asarray(pages)))


@functools.partial(
    jax.jit, static_argnames=("backend", "soft_cap", "scale"), donate_argnames=("cache",)
)
def step(cache, new_tokens, accepted, qs, ks, vs, q_sink, sink_logits, *, scale, soft_cap, backend):
    """Prepares, attends every layer, commits; returns the cache and `[layers, ...]` outputs."""
    cache = cache.prepare(new_tokens)
    outs = []
    for layer, spec in enumerate(cache.config.layers):
        rotated = None if spec.q_sink_limit is None else q_sink[layer]
        cache, out = cache.attend(
            layer,
            qs[layer],
            ks[layer],
            vs[layer],
            scale=scale,
            soft_cap=soft_cap,
            q_sink=rotated,
            sink_logits=None if sink_logits is None else sink_logits[layer],
            backend=backend,
        )
        outs.append(out)
    return cache.commit(accepted), outs


oracle = jax.jit(dense_attention, static_argnames=("scale", "window", "sink_tokens", "soft_cap"))


class Twin:
    """A cache and, beside it, every sequence's whole history, attended by the dense formula."""

    def __init__(
        self,
        config: CacheConfig,
        *,
        q_heads: int,
        seed: int = 0,
        sinks: bool = False,
        soft_cap: float | None = None,
        backend: str | None = None,
    ):
        self.config, self.q_heads, self.backend = config, q_heads, backend
        self.rng = np.random.default_rng(seed)
        self.cache = KVCache.create(config)
        self.soft_cap = soft_cap
        self.sink_logits = self.random(len(config.layers), q_heads) if sinks else None
        spec = config.layers[0]
        empty = np.zeros((0, spec.kv_heads, spec.head_dim), np.float32)
        self.history = [[(empty, empty) for _ in range(config.batch)] for _ in config.layers]
        self.scale = 0.7 * spec.head_dim**-0.5

    def random(self, *shape):
        return jnp.asarray(self.rng.standard_normal(shape, dtype=np.float32))

    def step(self, new_tokens, accepted=None, *, poison=True):
        """Runs one step on both; returns pairs `(cache's output, oracle's)` for each sequence."""
        accepted = new_tokens if accepted is None else accepted
        spec = self.config.layers[0]
        batch, layers = self.config.batch, len(self.config.layers)
        n = 1 if max(new_tokens) <= 1 else self.config.max_new_tokens  # two shapes to compile
        q, q_sink = (self.random(layers, batch, n, self.q_heads, spec.head_dim) for _ in range(2))
        k, v = (self.random(layers, batch, n, spec.kv_heads, spec.head_dim) for _ in range(2))
        k, v = (x.astype(spec.dtype).astype(jnp.float32) for x in (k, v))
        before = np.asarray(self.cache.lengths)
        if poison:
            self.cache = poison_unread(self.cache)
        as_i32 = lambda x: jnp.asarray(x, jnp.int32)
        self.cache, outs = step(
            self.cache,
            as_i32(new_tokens),
            as_i32(accepted),
            q,
            k,
            v,
            q_sink,
            self.sink_logits,
            scale=self.scale,
            soft_cap=self.soft_cap,
            backend=self.backend,
        )
        pairs = []
        granted = np.asarray(~(self.cache.starved | self.cache.too_long))
        for b in range(batch):
            count = new_tokens[b] if granted[b] else 0
            for layer in range(layers):
                pairs.append(self._check(layer, b, count, before[b], q, k, v, q_sink, outs))
                past = self.history[layer][b]
                keep = min(accepted[b], count)
                new = (np.asarray(k[layer, b, :keep]), np.asarray(v[layer, b, :keep]))
                self.history[layer][b] = tuple(
                    np.concatenate([x, y]) for x, y in zip(past, new, strict=True)
                )
        return pairs

    def _check(self, layer, b, count, start, q, k, v, q_sink, outs):
        spec = self.config.layers[layer]
        past_k, past_v = self.history[layer][b]
        assert len(past_k) == start
        room = self.config.max_tokens  # padded, so that the oracle compiles once
        keys, values = (np.zeros((1, room, *past_k.shape[1:]), np.float32) for _ in range(2))
        keys[0, :start], keys[0, start : start + count] = past_k, k[layer, b, :count]
        values[0, :start], values[0, start : start + count] = past_v, v[layer, b, :count]
        j = np.arange(room, dtype=np.int32)
        row = np.arange(q.shape[2], dtype=np.int32)
        expected, _ = oracle(
            q[layer, b][None],
            keys,
            values,
            np.where(row < count, start + row, -1)[None],
            np.where(j < start + count, j, -1)[None],
            scale=self.scale,
            window=spec.window,
            sink_tokens=spec.sink_tokens,
            soft_cap=self.soft_cap,
            sink_logits=None if self.sink_logits is None else self.sink_logits[layer],
            q_sink=None if spec.q_sink_limit is None else q_sink[layer, b][None],
        )
        return np.asarray(outs[layer][b]), np.asarray(expected[0])
