"""Draws the next token of each row from logits, each row by rules of its own."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.sampling import LogitsHook, Sampling

COLDEST = 1e-30  # least temperature: greedy in effect; a smaller one would make logits infinite
OFF = {"top_k": 2**31 - 1, "top_p": 1.0, "min_p": 0.0}  # values that keep every token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """`Sampling` of each row of a batch; None where no row uses a rule, which leaves it out."""

    temperature: jax.Array | None  # f32[batch], 0 for a greedy row; None where all are
    top_k: jax.Array | None  # i32[batch]
    top_p: jax.Array | None  # f32[batch]
    min_p: jax.Array | None  # f32[batch]
    repetition_penalty: jax.Array | None  # f32[batch]
    presence_penalty: jax.Array | None  # f32[batch]
    frequency_penalty: jax.Array | None  # f32[batch]
    min_tokens: jax.Array | None  # i32[batch]
    hook: LogitsHook | None = dataclasses.field(metadata=dict(static=True))


def rules_of(samplings: Sequence[Sampling]) -> Rules:
    """The rules of a batch, one `Sampling` per row, each after `checked()`.

    Raises:
      ValueError: requests have different hooks.
    """
    hooks = {id(one.hook): one.hook for one in samplings}
    if len(hooks) > 1:
        raise ValueError(f"sampling names {len(hooks)} hooks: all requests must share one.")

    def column(name: str, dtype: type, off: float) -> jax.Array | None:
        values = [getattr(one, name) for one in samplings]
        if all(value is None or value == off for value in values):
            return None
        return jnp.asarray(np.asarray([off if v is None else v for v in values], dtype))

    return Rules(
        temperature=column("temperature", np.float32, 0.0),
        top_k=column("top_k", np.int32, OFF["top_k"]),
        top_p=column("top_p", np.float32, OFF["top_p"]),
        min_p=column("min_p", np.float32, OFF["min_p"]),
        repetition_penalty=column("repetition_penalty", np.float32, 1.0),
        presence_penalty=column("presence_penalty", np.float32, 0.0),
        frequency_penalty=column("frequency_penalty", np.float32, 0.0),
        min_tokens=column("min_tokens", np.int32, 0),
        hook=next(iter(hooks.values())),
    )


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


def adjust(
    logits: jax.Array,
    rules: Rules,
    tokens: jax.Array,
    prompt_lens: jax.Array,
    lens: jax.Array,
    stop_ids: jax.Array,
) -> jax.Array:
    """Applies penalties, `min_tokens` and the hook.

    Args:
      logits: `f32[batch, vocab]`.
      rules: one row per request.
      tokens: `i32[batch, width]`, prompt and answer of each request.
      prompt_lens: `i32[batch]`, tokens of the prompt.
      lens: `i32[batch]`, tokens of prompt and answer so far; later entries of `tokens` are -1.
      stop_ids: `i32[batch, n]`, tokens that end a request; negative entries are none.

    Raises:
      ValueError: the hook returns another shape or type than it was given.
    """
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    known = place < lens[:, None]
    if rules.repetition_penalty is not None:
        penalty = rules.repetition_penalty[:, None]
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(_count(logits, tokens, known) > 0, penalized, logits)
    if rules.presence_penalty is not None or rules.frequency_penalty is not None:
        count = _count(logits, tokens, known & (place >= prompt_lens[:, None]))
        if rules.presence_penalty is not None:
            logits = logits - jnp.where(count > 0, rules.presence_penalty[:, None], 0)
        if rules.frequency_penalty is not None:
            logits = logits - rules.frequency_penalty[:, None] * count.astype(logits.dtype)
    if rules.min_tokens is not None:
        early = (lens - prompt_lens < rules.min_tokens)[:, None]
        ends = _count(logits, stop_ids, stop_ids >= 0) > 0
        logits = jnp.where(early & ends, -jnp.inf, logits)
    if rules.hook is not None:
        hooked = rules.hook(logits, tokens)
        given = (logits.shape, logits.dtype)
        got = (getattr(hooked, "shape", None), getattr(hooked, "dtype", None))
        if got != given:
            raise ValueError(f"hook must return logits {given}, as it was given, not {got}.")
        logits = hooked
    return logits


def _count(logits: jax.Array, ids: jax.Array, counts: jax.Array) -> jax.Array:
    """How often each token is among `ids` where `counts`, `i32[batch, vocab]`."""
    batch, vocab = logits.shape
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    zeros = jnp.zeros((batch, vocab), jnp.int32)
    return zeros.at[row, jnp.where(counts, ids, vocab)].add(1, mode="drop")


def draw(logits: jax.Array, rules: Rules, keys: jax.Array) -> jax.Array:
    """Draws one token for each row.

    Args:
      logits: `f32[batch, vocab]`, after `adjust`.
      rules: one row per request.
      keys: `[batch]` random keys, so that a row's draw does not depend on its neighbours.

    Returns:
      `i32[batch]`.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if rules.temperature is None:
        return best
    warm = rules.temperature > 0
    logits = logits / jnp.maximum(rules.temperature, COLDEST)[:, None]
    logits = jnp.where(logits >= _threshold(logits, rules), logits, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return jnp.where(warm, drawn, best)


def _threshold(logits: jax.Array, rules: Rules) -> jax.Array:
    """The least logit that every rule keeps, `f32[batch, 1]`."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    least = jnp.full_like(best, -jnp.inf)
    if rules.top_k is not None or rules.top_p is not None:
        ranked = -jnp.sort(-logits, axis=-1)
        rank = jnp.arange(ranked.shape[-1], dtype=jnp.int32)[None]
        if rules.top_k is not None:
            ranked = jnp.where(rank < rules.top_k[:, None], ranked, -jnp.inf)
        if rules.top_p is not None:
            p = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(p, axis=-1) - p  # probability of all more likely tokens
            most = jnp.where(rules.top_p < 1, rules.top_p, jnp.inf)[:, None]  # 1 keeps all
            ranked = jnp.where((before < most) | (rank == 0), ranked, -jnp.inf)
        kept = jnp.where(ranked == -jnp.inf, jnp.inf, ranked)
        least = jnp.min(kept, axis=-1, keepdims=True)
    if rules.min_p is not None:
        least = jnp.maximum(least, best + jnp.log(rules.min_p)[:, None])
    return least
