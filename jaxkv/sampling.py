"""Picks the next token from logits: greedy, or a draw after temperature, top-k, top-p and min-p."""

import dataclasses

import jax
import jax.numpy as jnp

COLDEST = 1e-30  # least temperature: greedy in effect; a smaller one would make logits infinite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw; `Sampling()` is greedy.

    None leaves a rule out of the compiled program; a number can change without compiling again.
    Rules apply in the order of the fields, each to the tokens that the previous one kept.

    Attributes:
      temperature: logits are divided by it; None or 0 takes the largest logit.
      top_k: keep the `top_k` most likely tokens.
      top_p: keep the most likely tokens whose probabilities first reach `top_p` (arXiv:1904.09751).
      min_p: drop tokens less likely than `min_p` times the best one (arXiv:2407.01082).
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def checked(self) -> "Sampling":
        """Returns itself, greedy if temperature is 0; raises ValueError naming a bad value."""
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be at least 0.")
        if self.top_k is not None and (self.top_k < 1 or self.top_k != int(self.top_k)):
            raise ValueError(f"top_k={self.top_k} must be a whole number, at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be between 0 and 1.")
        return self if self.temperature else Sampling()


def draw_keys(seeds: jax.Array, counts: jax.Array) -> jax.Array:
    """Random keys of the next draws: each depends only on a request's own seed and count.

    Args:
      seeds: `u32[batch]`.
      counts: `i32[batch]`, tokens that each request has drawn so far.

    Returns:
      `[batch]` keys. They are threefry keys whatever JAX's default is: with other generators, the
      bits of a row would depend on its place in the batch.
    """
    return jax.vmap(
        lambda seed, count: jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), count)
    )(seeds, counts)


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """Draws one token for each row.

    Args:
      logits: `f32[batch, vocab]`.
      sampling: how to draw, after `checked()`.
      keys: `[batch]` random keys, so that a row's draw does not depend on its neighbours.

    Returns:
      `i32[batch]`.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / jnp.maximum(sampling.temperature, COLDEST)
    logits = jnp.where(logits >= _threshold(logits, sampling), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _threshold(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The least logit that every rule keeps, `f32[batch, 1]`."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    least = jnp.full_like(best, -jnp.inf)
    if sampling.top_k is not None or sampling.top_p is not None:
        ranked = -jnp.sort(-logits, axis=-1)
        rank = jnp.arange(ranked.shape[-1], dtype=jnp.int32)[None]
        if sampling.top_k is not None:
            ranked = jnp.where(rank < sampling.top_k, ranked, -jnp.inf)
        if sampling.top_p is not None:
            p = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(p, axis=-1) - p  # probability of all more likely tokens
            ranked = jnp.where((before < sampling.top_p) | (rank == 0), ranked, -jnp.inf)
        kept = jnp.where(ranked == -jnp.inf, jnp.inf, ranked)
        least = jnp.min(kept, axis=-1, keepdims=True)
    if sampling.min_p is not None:
        least = jnp.maximum(least, best + jnp.log(jnp.float32(1) * sampling.min_p))
    return least
