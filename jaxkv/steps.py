"""The jitted steps of generation: a chunk of the prompts, first tokens, a block of decode steps.

The whole state is one pytree on the device; within a block the host takes no part.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxkv.cache import KVCache
from jaxkv.model import Model
from jaxkv.sampling import Sampling, draw_keys, sample
from pallas_kernels.backends import Backend

RUNNING, STOPPED, LENGTH, STARVED = range(4)
STOP_REASONS = ("running", "stop", "length", "no_pages")
NO_TOKEN = -1  # marks a sequence that did not advance, and pads lists of stop tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """The requests of a batch, one per sequence."""

    seeds: jax.Array  # u32[batch], seed of a request's draws
    limits: jax.Array  # i32[batch], most tokens to generate
    stop_ids: jax.Array  # i32[batch, n], tokens that end a sequence, padded with NO_TOKEN
    sampling: Sampling  # after `checked()`; the same for all sequences


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationState:
    """Everything that a decode step changes."""

    cache: KVCache
    token: jax.Array  # i32[batch], the token sampled last, not yet in the cache
    produced: jax.Array  # i32[batch], number of tokens sampled so far
    status: jax.Array  # i32[batch], RUNNING or why the sequence ended
    peak_pages: jax.Array  # i32[stores], most pages in use so far


@functools.partial(jax.jit, static_argnames=("chunk", "backend"), donate_argnames=("cache", "last"))
def prefill_chunk(
    model: Model,
    cache: KVCache,
    last: jax.Array,
    prompts: jax.Array,
    prompt_lens: jax.Array,
    *,
    chunk: int,
    backend: Backend | None,
) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:
    """Feeds each sequence the next `chunk` tokens of its prompt, or fewer if fewer are left.

    Args:
      model: the model and its weights.
      cache: donated; its lengths say how many tokens of each prompt it holds.
      last: `[batch, hidden]`, donated; hidden state of each prompt's last token, once known.
      prompts: `i32[batch, tokens]`, padded at the end.
      prompt_lens: `i32[batch]`.
      chunk: most tokens per sequence, at most the cache's `max_new_tokens`.
      backend: backend of the attention.

    Returns:
      The new cache; the new `last`; `i32[stores]`, pages in use while the chunk was attended;
      `i32[]`, tokens of all sequences in the new cache.
    """
    count = jnp.clip(prompt_lens - cache.lengths, 0, chunk)
    place = jnp.minimum(cache.positions(chunk), prompts.shape[1] - 1)
    cache = cache.prepare(count)
    hidden, cache = model(jnp.take_along_axis(prompts, place, axis=1), cache, backend=backend)
    ends = (cache.pending > 0) & (cache.lengths + cache.pending == prompt_lens)
    final = jnp.maximum(cache.pending - 1, 0)[:, None, None]
    final = jnp.take_along_axis(hidden, final, axis=1)[:, 0]
    last, used = jnp.where(ends[:, None], final, last), cache.pages_in_use
    cache = cache.commit(count)
    return cache, last, used, jnp.sum(cache.lengths)


@functools.partial(jax.jit, donate_argnames=("cache",))
def start(model: Model, cache: KVCache, last: jax.Array, requests: Requests) -> GenerationState:
    """Samples each sequence's first token from the hidden state of its prompt's last.

    Args:
      model: the model and its weights.
      cache: donated; it holds the prompts.
      last: `[batch, hidden]`, as `prefill_chunk` returns it.
      requests: one per sequence.
    """
    state = GenerationState(
        cache=cache,
        token=jnp.zeros_like(cache.lengths),
        produced=jnp.zeros_like(cache.lengths),
        status=jnp.full_like(cache.lengths, RUNNING),
        peak_pages=cache.pages_in_use,
    )
    return _advance(model, state, last, jnp.ones(cache.config.batch, bool), requests)


@functools.partial(jax.jit, static_argnames=("steps", "backend"), donate_argnames=("state",))
def decode_block(
    model: Model,
    state: GenerationState,
    requests: Requests,
    *,
    steps: int,
    backend: Backend | None,
) -> tuple[GenerationState, jax.Array, jax.Array]:
    """Runs up to `steps` decode steps in one `while_loop`, fewer if no sequence can go on.

    Args:
      model: the model and its weights.
      state: donated.
      requests: one per sequence.
      steps: most decode steps to run.
      backend: backend of the attention.

    Returns:
      The new state; `i32[batch, steps]`, sampled tokens, `NO_TOKEN` where a sequence had ended or
      starved; `i32[]`, number of steps run.
    """

    def goes_on(carry):
        step, state, _, advanced = carry
        return (step < steps) & advanced & jnp.any(state.status == RUNNING)

    def body(carry):
        step, state, out, _ = carry
        count = (state.status == RUNNING).astype(jnp.int32)
        cache = state.cache.prepare(count)
        hidden, cache = model(state.token[:, None], cache, backend=backend)
        advances = cache.pending > 0
        peak = jnp.maximum(state.peak_pages, cache.pages_in_use)
        state = dataclasses.replace(state, cache=cache.commit(count), peak_pages=peak)
        state = _advance(model, state, hidden[:, 0], advances, requests)
        sampled = jnp.where(advances, state.token, NO_TOKEN)
        return step + 1, state, out.at[:, step].set(sampled), jnp.any(advances)

    out = jnp.full((state.token.size, steps), NO_TOKEN, jnp.int32)
    init = (jnp.int32(0), state, out, jnp.bool_(True))
    step, state, out, advanced = jax.lax.while_loop(goes_on, body, init)
    # No sequence could go on: each running one waits for pages that only running ones hold.
    stuck = ~advanced & (state.status == RUNNING)
    state = dataclasses.replace(state, status=jnp.where(stuck, STARVED, state.status))
    return state, out, step


def _advance(
    model: Model,
    state: GenerationState,
    hidden: jax.Array,
    advances: jax.Array,
    requests: Requests,
) -> GenerationState:
    """Samples from `hidden`, `[batch, hidden]`, where `advances`; ends and frees done sequences."""
    keys = draw_keys(requests.seeds, state.produced)
    drawn = sample(model.unembed(hidden), requests.sampling, keys)
    token = jnp.where(advances, drawn, state.token)
    produced = state.produced + advances.astype(jnp.int32)
    status = jnp.where(advances & (produced >= requests.limits), LENGTH, state.status)
    stops = jnp.any(token[:, None] == requests.stop_ids, axis=1)
    status = jnp.where(advances & stops, STOPPED, status)
    ended = (state.status == RUNNING) & (status != RUNNING)
    cache = jax.lax.cond(jnp.any(ended), lambda c: c.free(ended), lambda c: c, state.cache)
    return dataclasses.replace(state, cache=cache, token=token, produced=produced, status=status)
