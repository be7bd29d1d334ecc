"""A model that has the members of `jaxkv.Model` and no others, and its formula in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import KVCache, LayerSpec

STATIC = dict(static=True)
WINDOWS = (None, 6)  # one entry per layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainModel:
    """Two attention layers without positions, norms or MLPs."""

    embedding: jax.Array  # f32[vocab, hidden]
    qkv: jax.Array  # f32[layers, 3, hidden, heads, head_dim]
    output: jax.Array  # f32[layers, heads, head_dim, hidden]
    head: jax.Array  # f32[hidden, vocab]
    eos_ids: tuple[int, ...] = dataclasses.field(default=(), metadata=STATIC)
    max_position: int | None = dataclasses.field(default=None, metadata=STATIC)

    @property
    def vocab_size(self):
        return self.embedding.shape[0]

    def layer_specs(self, keep):
        heads, head_dim = self.output.shape[1:3]
        layer = LayerSpec(kv_heads=heads, head_dim=head_dim, dtype="float32")
        return keep.apply([dataclasses.replace(layer, window=window) for window in WINDOWS])

    def __call__(self, tokens, cache: KVCache, *, backend):
        x = self.embedding[tokens]
        for layer, window in enumerate(WINDOWS):
            assert window is None or cache.config.layers[layer].window <= window
            q, k, v = jnp.einsum("btm,nmhd->nbthd", x, self.qkv[layer])
            cache, out = cache.attend(layer, q, k, v, backend=backend)
            x = x + jnp.einsum("bthd,hdm->btm", out, self.output[layer])
        return x, cache

    def unembed(self, hidden):
        return hidden @ self.head


def plain_model(*, vocab=40, hidden=24, heads=2, head_dim=16, seed=0, **options) -> PlainModel:
    """Random weights, large enough that attention decides which token is next."""
    rng = np.random.default_rng(seed)
    layers = len(WINDOWS)
    draw = lambda *shape: jnp.asarray(rng.normal(0, hidden**-0.5, shape), jnp.float32)
    return PlainModel(
        embedding=4 * draw(vocab, hidden),
        qkv=draw(layers, 3, hidden, heads, head_dim),
        output=2 * draw(layers, heads, head_dim, hidden),
        head=draw(hidden, vocab),
        **options,
    )


def plain_hidden(model: PlainModel, tokens, window=None):
    """Hidden states `[tokens, hidden]` of one sequence and each layer's keys, in numpy."""
    x, keys = np.asarray(model.embedding)[np.asarray(tokens)], []
    behind = np.arange(len(tokens))[:, None] - np.arange(len(tokens))[None]
    for layer, own in enumerate(WINDOWS):
        q, k, v = np.einsum("tm,nmhd->nthd", x, np.asarray(model.qkv[layer]))
        spans = [size for size in (own, window) if size is not None]
        sees = (behind >= 0) & (behind < min(spans, default=len(tokens)))
        score = np.where(sees, np.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5, -np.inf)
        p = np.exp(score - score.max(axis=-1, keepdims=True))
        out = np.einsum("hij,jhd->ihd", p / p.sum(axis=-1, keepdims=True), v)
        x = x + np.einsum("ihd,hdm->im", out, np.asarray(model.output[layer]))
        keys.append(k)
    return x, keys


def plain_greedy(model: PlainModel, prompt, count, window=None) -> list[int]:
    """The likeliest continuation, everything computed anew for each token."""
    tokens = list(prompt)
    for _ in range(count):
        hidden, _ = plain_hidden(model, tokens, window)
        tokens.append(int((hidden[-1] @ np.asarray(model.head)).argmax()))
    return tokens[len(prompt) :]
