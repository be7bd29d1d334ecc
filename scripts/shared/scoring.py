"""Next-token predictions of a real text through caches: KL divergence, perplexity, agreement.

Teacher-forced, chunk by chunk, through the same caches that generation uses. Every codec's cache
takes a chunk right after the exact one did, so that only one chunk's distributions are alive.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv

Array = jax.Array | np.ndarray


class Scores(NamedTuple):
    """A codec's next-token distributions beside the exact ones, each `f32[tokens]`."""

    kl: Array  # KL(exact || codec), nats
    exact_log_prob: Array  # of the target
    log_prob: Array
    agrees: Array  # 1 where both find the same token most likely, else 0


@functools.partial(jax.jit, donate_argnames="cache")
def predict(model, tokens, count, cache):
    """Runs `tokens`, `i32[1, chunk]`, of which `count` are real.

    Returns:
      Log-probabilities of the next token, `f32[chunk, vocab]`, and the cache.
    """
    count = jnp.asarray(count, jnp.int32)[None]
    hidden, cache = model(tokens, cache.prepare(count))
    logits = model.unembed(hidden)[0].astype(jnp.float32)
    return jax.nn.log_softmax(logits, axis=-1), cache.commit(count)


@functools.partial(jax.jit, donate_argnames="cache")
def score(model, tokens, targets, count, exact, cache):
    """Runs a codec's cache over the tokens for which the exact one predicted `exact`.

    Returns:
      `Scores` of the chunk's rows, and the cache.
    """
    coded, cache = predict(model, tokens, count, cache)
    agrees = jnp.argmax(exact, axis=-1) == jnp.argmax(coded, axis=-1)
    scores = Scores(
        kl=kl_divergence(exact, coded),
        exact_log_prob=pick(exact, targets),
        log_prob=pick(coded, targets),
        agrees=agrees.astype(jnp.float32),
    )
    return scores, cache


def pick(log_probs: jax.Array, targets: jax.Array) -> jax.Array:
    """Each row's entry of its target, `[tokens]` from `[tokens, vocab]`."""
    return jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]


def kl_divergence(p_log: jax.Array, q_log: jax.Array) -> jax.Array:
    """`sum(p * log(p / q))` over the last axis, nats, from log-probabilities.

    Summed as `p * (d + exp(-d) - 1)` with `d = log(p / q)`, which is the same as both sum to 1:
    no term is negative, so rounding can't drown a small divergence.
    """
    d = p_log - q_log
    near = jnp.abs(d) < 1  # elsewhere nothing cancels, and exp(-d) might overflow
    small = jnp.where(near, d, 0)
    p, q = jnp.exp(p_log), jnp.exp(q_log)
    return jnp.sum(jnp.where(near, p * (small + jnp.expm1(-small)), p * d - p + q), axis=-1)


def perplexity(
    model,
    tokens: np.ndarray,
    config: jaxkv.CacheConfig,
    *,
    done: Callable[[], None] = lambda: None,
) -> float:
    """Perplexity of `tokens`, `i32[n]`, through a fresh cache, `config.max_new_tokens` at a time.

    `done` is called after each step.
    """
    cache, total = jaxkv.KVCache.create(config), 0.0
    for inputs, targets, count in chunks(tokens, config.max_new_tokens):
        log_probs, cache = predict(model, inputs, count, cache)
        total += float(jnp.sum(pick(log_probs, targets)[:count]))
        done()
    return float(np.exp(-total / (len(tokens) - 1)))


def compare_caches(
    model,
    tokens: np.ndarray,
    exact: jaxkv.CacheConfig,
    coded: dict[str, jaxkv.CacheConfig],
    *,
    begin: Callable[[str, int], None] = lambda name, tokens: None,
) -> tuple[dict[str, Scores], dict[str, jaxkv.KVCache]]:
    """Scores `tokens`, `i32[n]`, through the exact cache and each codec's.

    Args:
      model: a `Decoder`.
      tokens: the text.
      exact: the exact cache; a chunk has its `max_new_tokens` tokens.
      coded: each codec's cache.
      begin: called before each step with the name of the cache and the number of tokens.

    Returns:
      Scores of the `n - 1` predictions, and the caches that made them, by codec.

    Raises:
      ValueError: a prediction that is not finite.
    """
    reference = jaxkv.KVCache.create(exact)
    caches = {name: jaxkv.KVCache.create(config) for name, config in coded.items()}
    parts: dict[str, list[Scores]] = {name: [] for name in coded}
    for inputs, targets, count in chunks(tokens, exact.max_new_tokens):
        begin("exact", count)
        expected, reference = predict(model, inputs, count, reference)
        for name in coded:
            begin(name, count)
            found, caches[name] = score(model, inputs, targets, count, expected, caches[name])
            parts[name].append(Scores(*(np.asarray(x)[:count] for x in found)))
    scores = {
        name: Scores(*map(np.concatenate, zip(*part, strict=True))) for name, part in parts.items()
    }
    for name, found in scores.items():
        if not all(np.isfinite(x).all() for x in found):
            raise ValueError(f"codec {name!r} or this model gives predictions that are not finite.")
    return scores, caches


def chunks(tokens: np.ndarray, size: int) -> Iterator[tuple[jax.Array, jax.Array, int]]:
    """Pieces of the text: inputs `i32[1, size]`, targets `i32[size]`, how many of them are real."""
    for start in range(0, len(tokens) - 1, size):
        stop = min(start + size, len(tokens) - 1)
        pad = lambda x: jnp.asarray(np.pad(x, (0, size - len(x))), jnp.int32)
        yield pad(tokens[start:stop])[None], pad(tokens[start + 1 : stop + 1]), stop - start


def stored_bits(cache: jaxkv.KVCache) -> float:
    """Bits per cached number that the live arrays take, exact tokens beside codes left out.

    Keys and values, factors and page means, layout padding; layers averaged.
    """
    bits = 0.0
    for group in cache.config.groups:
        store = cache.stores[group.stores[-1]]
        spec = group.spec
        values = 2 * spec.kv_heads * spec.head_dim * cache.config.page_size  # per page and layer
        bits += 8 * store.page_bytes / values  # of all layers of the group
    return bits / len(cache.config.layers)


def summarize(name: str, scores: Scores, bits: float) -> dict:
    """One codec's results."""
    loss = np.mean(np.float64(scores.exact_log_prob) - np.float64(scores.log_prob))
    return {
        "codec": name,
        "bits_per_value": bits,
        "kl": float(np.mean(np.float64(scores.kl))),
        "kl_p99": float(np.percentile(scores.kl, 99)),
        "ppl_ratio": float(np.exp(loss)),
        "top1": float(np.mean(scores.agrees)),
    }
