"""Builders that tests share: a cache that is driven beside a plain history of the same tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import CacheConfig, KVCache
from jaxkv.codecs import dequantize_original
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.rule import PageLag, Rule

# Largest difference from the float32 oracle, by the dtype of pages, which rounds keys and values.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}

# For `lowered.compile(AS_USERS)` where the program itself is tested, its copies and its memory:
# conftest.py sets another emitter to save time.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if jax.lib.__version__.startswith("0.10.") else {}


def poison_unread(cache: KVCache) -> KVCache:
    """Returns the cache with NaN wherever there is no live token: free pages, tails, null page.

    Integer codes become their largest value, their factors and means NaN.
    """
    stores = tuple(_poison_store(store, cache) for store in cache.stores)
    return dataclasses.replace(cache, stores=stores)


def _poison_store(store, cache: KVCache):
    size, span = cache.config.page_size, store.spec.span
    live = np.zeros((store.spec.pages, size), bool)
    ring, sinks = np.asarray(store.tables.ring), store.tables.sinks
    window, lag = span.rule.window, span.rule.lag or PageLag(size)
    for b, length in enumerate(np.asarray(cache.lengths)):
        oldest = 0 if window is None else max(0, length - window + 1)
        for j in range(length):
            page, behind = j // size, length // size - j // size
            if page < span.sink_pages:
                live[sinks[b, page], j % size] = True
            elif page >= span.first and j >= oldest and lag.least <= behind:
                if lag.most is None or behind < lag.most:
                    live[ring[b, page % store.spec.width], j % size] = True
    assert not live[0].any(), "the null page holds live tokens"
    layout, arrays = store.pages.layout, {}
    for name, axis in layout.token_axes.items():
        x = store.pages.arrays[name]
        shape = [1] * x.ndim
        shape[1], shape[axis] = live.shape
        arrays[name] = _poison(x, ~live.reshape(shape))
    mean = store.pages.key_mean
    if mean is not None and mean.shape[1] > 1:
        mean = _poison(mean, ~live.any(axis=1)[None, :, None, None])
    pages = dataclasses.replace(store.pages, arrays=arrays, key_mean=mean)
    return dataclasses.replace(store, pages=pages)


def _poison(pages: jax.Array, hide: np.ndarray) -> jax.Array:
    floats = jnp.issubdtype(pages.dtype, jnp.floating)
    value = np.asarray(np.nan, pages.dtype) if floats else np.iinfo(pages.dtype).max
    return jnp.asarray(np.where(hide, value, np.asarray(pages)))


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


fork = jax.jit(KVCache.fork, donate_argnums=0)
oracle = jax.jit(dense_attention, static_argnames=("scale", "rule", "soft_cap"))


class Twin:
    """A cache beside every sequence's whole history, which is attended by the dense formula."""

    def __init__(
        self,
        config: CacheConfig,
        *,
        q_heads: int,
        seed: int = 0,
        sinks: bool = False,
        soft_cap: float | None = None,
        backend: str | None = None,
        key_means: list[np.ndarray] | None = None,
    ):
        self.key_means = key_means
        self.config, self.q_heads, self.backend = config, q_heads, backend
        self.rng = np.random.default_rng(seed)
        self.cache = KVCache.create(config, key_means=key_means)
        self.soft_cap = soft_cap
        self.sink_logits = self.random(len(config.layers), q_heads) if sinks else None
        spec = config.layers[0]
        empty = np.zeros((0, spec.kv_heads, spec.head_dim), np.float32)
        self.history = [[(empty, empty) for _ in range(config.batch)] for _ in config.layers]
        self.scale = 0.7 * spec.head_dim**-0.5

    def random(self, *shape):
        return jnp.asarray(self.rng.standard_normal(shape, dtype=np.float32))

    def step(self, new_tokens, accepted=None, *, poison=True):
        """Runs one step on both; returns `(cache's output, oracle's)` per sequence and layer."""
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

    def fork(self, src, dst):
        """Forks both; the pools must be large enough."""
        self.cache = fork(self.cache, jnp.int32(src), jnp.int32(dst))
        assert not np.asarray(self.cache.starved).any()
        for sequences in self.history:
            sequences[dst] = sequences[src]

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
            rule=Rule(window=spec.window, sink_tokens=spec.sink_tokens),
            soft_cap=self.soft_cap,
            sink_logits=None if self.sink_logits is None else self.sink_logits[layer],
            q_sink=None if spec.q_sink_limit is None else q_sink[layer, b][None],
        )
        return np.asarray(outs[layer][b]), np.asarray(expected[0])


@functools.partial(jax.jit, static_argnames=("codec", "page_size"))
def as_read(codec, page_size, k, v, static_mean):
    """Quantizes and dequantizes keys and values `[tokens, kv_heads, head_dim]` of whole pages."""
    k, v = (x.reshape(-1, page_size, *x.shape[1:]).swapaxes(1, 2) for x in (k, v))
    mean = None
    if codec.key_mean == "page":
        mean = codec.key.unrotate(codec.key_page_mean(k))[..., None, :]
    if codec.key_mean == "static":
        mean = codec.key.unrotate(codec.stored_mean(static_mean))[None, :, None, :]
    back = (
        dequantize_original(codec.key, codec.key.quantize(k, mean), mean),
        dequantize_original(codec.value, codec.value.quantize(v)),
    )
    return tuple(x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in back)


class CodedTwin(Twin):
    """A twin for lossy codecs: positions alone say for each query and key if codes are read."""

    def _check(self, layer, b, count, start, q, k, v, q_sink, outs):
        spec = self.config.effective(self.config.layers[layer])
        codec, size = spec.kv_codec, self.config.page_size
        got = np.asarray(outs[layer][b])
        past_k, past_v = self.history[layer][b]
        new = (np.asarray(x[layer, b, :count]) for x in (k, v))
        k, v = (np.concatenate(x) for x in zip((past_k, past_v), new, strict=True))
        length = start + count
        assert len(k) == length
        room = -(-self.config.max_tokens // size) * size  # one shape to compile
        mean = None if self.key_means is None else self.key_means[layer]
        pad = lambda x: np.pad(x, [(0, room - length), (0, 0), (0, 0)])
        k_codes, v_codes = (
            np.asarray(x)[:length] for x in as_read(codec, size, pad(k), pad(v), mean)
        )
        i = start + np.arange(count)[:, None]
        j = np.arange(length)[None]
        sees = j <= i
        if spec.window is not None:
            sees &= (i - j < spec.window) | (j < spec.sink_tokens)
        sink_pages = -(-max(spec.sink_tokens, codec.sink_tokens) // size)
        coded = (j // size >= sink_pages) & (i // size - j // size >= codec.recent_pages)
        coded &= codec.lossy
        expected = np.zeros(got.shape, np.float32)
        group = self.q_heads // spec.kv_heads
        for head in range(self.q_heads):
            own = head // group
            query = np.asarray(q[layer, b, :count, head], np.float64)
            rotated = np.asarray(q_sink[layer, b, :count, head], np.float64)
            score = np.where(coded, query @ k_codes[:, own].T, query @ k[:, own].T)
            if spec.q_sink_limit is not None:
                score = np.where(j < spec.sink_tokens, rotated @ k[:, own].T, score)
            score = score * self.scale
            if self.soft_cap is not None:
                score = self.soft_cap * np.tanh(score / self.soft_cap)
            p = np.where(sees, np.exp(score), 0)
            total = p.sum(axis=1, keepdims=True)
            if self.sink_logits is not None:
                total = total + np.exp(np.float64(self.sink_logits[layer, head]))
            p = p / np.where(total > 0, total, 1)
            expected[:count, head] = (p * coded) @ v_codes[:, own] + (p * ~coded) @ v[:, own]
        return got, expected
