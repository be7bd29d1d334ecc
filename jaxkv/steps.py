"""The jitted steps of generation: a chunk of the prompts, and a block of decode steps.

The whole state is one pytree on the device; within a block the host takes no part. A prompt's last
token is fed by the first decode step, so that only decode steps compute logits.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxkv.cache import KVCache
from jaxkv.draw import Rules, adjust, draw, draw_keys
from jaxkv.model import Model
from pallas_kernels.backends import Backend

RUNNING, STOPPED, LENGTH, STARVED = range(4)
STOP_REASONS = ("running", "stop", "length", "no_pages")
NO_TOKEN = -1  # marks a sequence that did not advance, and pads lists of tokens
LOGIT_ROWS = 64  # rows of logits held at a time for the log-probabilities of prompts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """The requests of a batch, one per sequence."""

    prompt_lens: jax.Array  # i32[batch], tokens of the prompt
    seeds: jax.Array  # u32[batch], seed of a request's draws
    limits: jax.Array  # i32[batch], most tokens to generate
    stop_ids: jax.Array  # i32[batch, n], tokens that end a sequence, padded with NO_TOKEN
    rules: Rules  # how tokens are drawn
    # Likeliest tokens whose log-probabilities are reported beside each drawn token's; None: neither
    logprobs: int | None = dataclasses.field(metadata=dict(static=True))
    # Whether a sequence that ends gives its pages back at once, for others that wait for pages
    releases: bool = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationState:
    """Everything that a decode step changes."""

    cache: KVCache
    tokens: jax.Array  # i32[batch, width], prompt and answer, NO_TOKEN behind
    lens: jax.Array  # i32[batch], tokens of prompt and answer; the last is not yet in the cache
    status: jax.Array  # i32[batch], RUNNING or why the sequence ended
    peak_pages: jax.Array  # i32[stores], most pages in use so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a block of decode steps has drawn; entries of steps that did not run are NO_TOKEN."""

    tokens: jax.Array  # i32[batch, block], NO_TOKEN where a sequence had ended or starved
    logprobs: jax.Array | None  # f32[batch, block], of each token
    top_tokens: jax.Array | None  # i32[batch, block, n], the likeliest tokens
    top_logprobs: jax.Array | None  # f32[batch, block, n]


@functools.partial(
    jax.jit, static_argnames=("chunk", "backend"), donate_argnames=("cache", "logprobs")
)
def prefill_chunk(
    model: Model,
    cache: KVCache,
    logprobs: jax.Array | None,
    tokens: jax.Array,
    prompt_lens: jax.Array,
    *,
    chunk: int,
    backend: Backend | None,
) -> tuple[KVCache, jax.Array | None, jax.Array, jax.Array]:
    """Feeds each sequence the next `chunk` tokens of its prompt, up to the one before the last.

    Args:
      model: the model and its weights.
      cache: donated; its lengths say how many tokens of each prompt it holds.
      logprobs: `f32[batch, width]`, donated; log-probabilities of the prompts' tokens so far; None
        leaves them out.
      tokens: `i32[batch, width]`, prompts, padded at the end.
      prompt_lens: `i32[batch]`.
      chunk: most tokens per sequence, at most the cache's `max_new_tokens`.
      backend: backend of the attention.

    Returns:
      The new cache; the new `logprobs`; `i32[stores]`, pages in use while the chunk was attended;
      `i32[]`, tokens of all sequences in the new cache.
    """
    count = jnp.clip(prompt_lens - 1 - cache.lengths, 0, chunk)
    position = cache.positions(chunk)
    cache = cache.prepare(count)
    hidden, cache = model(_take(tokens, position), cache, backend=backend)
    if logprobs is not None:
        own = _logprobs_of(model, hidden, _take(tokens, position + 1))
        real = jnp.arange(chunk, dtype=jnp.int32)[None] < cache.pending[:, None]
        place = jnp.where(real, position + 1, tokens.shape[1])
        row = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
        logprobs = logprobs.at[row, place].set(own, mode="drop")
    used = cache.pages_in_use
    cache = cache.commit(cache.pending)
    return cache, logprobs, used, jnp.sum(cache.lengths, dtype=jnp.int32)


def start(cache: KVCache, tokens: jax.Array, requests: Requests) -> GenerationState:
    """The state before the first decode step: all of each prompt but its last token is cached.

    Args:
      cache: holds `prompt_lens - 1` tokens of each prompt.
      tokens: `i32[batch, width]`, prompts; the width has room for the answers.
      requests: one per sequence.
    """
    return GenerationState(
        cache=cache,
        tokens=tokens,
        # A copy: the state is donated, and the requests stay.
        lens=jnp.array(requests.prompt_lens, copy=True),
        status=jnp.full(tokens.shape[0], RUNNING, jnp.int32),
        peak_pages=cache.pages_in_use,
    )


@functools.partial(jax.jit, static_argnames=("block", "backend"), donate_argnames=("state",))
def decode_block(
    model: Model,
    state: GenerationState,
    requests: Requests,
    ended: jax.Array,
    steps: jax.Array,
    *,
    block: int,
    backend: Backend | None,
) -> tuple[GenerationState, Drawn, jax.Array]:
    """Runs up to `steps` decode steps in one `while_loop`, fewer if no sequence can go on.

    Args:
      model: the model and its weights.
      state: donated.
      requests: one per sequence.
      ended: `bool[batch]`, sequences that the caller ends before the first step.
      steps: `i32[]`, most decode steps to run, at most `block`.
      block: room for steps in what is returned.
      backend: backend of the attention.

    Returns:
      The new state; what was drawn; `i32[]`, number of steps run.
    """
    batch, vocab = state.tokens.shape[0], model.vocab_size
    none = lambda *shape: jnp.full((batch, block, *shape), NO_TOKEN, jnp.int32)
    number = lambda *shape: jnp.full((batch, block, *shape), -jnp.inf, jnp.float32)
    top = requests.logprobs
    out = Drawn(
        tokens=none(),
        logprobs=None if top is None else number(),
        top_tokens=none(min(top, vocab)) if top else None,
        top_logprobs=number(min(top, vocab)) if top else None,
    )

    def goes_on(carry):
        step, state, _, advanced = carry
        return (step < steps) & advanced & jnp.any(state.status == RUNNING)

    def body(carry):
        step, state, out, _ = carry
        count = (state.status == RUNNING).astype(jnp.int32)
        fed = _take(state.tokens, state.cache.lengths[:, None])
        cache = state.cache.prepare(count)
        hidden, cache = model(fed, cache, backend=backend)
        advances = cache.pending > 0
        peak = jnp.maximum(state.peak_pages, cache.pages_in_use)
        state = dataclasses.replace(state, cache=cache.commit(cache.pending), peak_pages=peak)
        logits = model.unembed(hidden[:, 0]).astype(jnp.float32)
        token = _draw(logits, state, requests)
        out = _record(out, step, logits, token, advances)
        return step + 1, _advance(state, token, advances, requests), out, jnp.any(advances)

    state = _end(state, jnp.where(ended, STOPPED, state.status), requests)
    init = (jnp.int32(0), state, out, jnp.bool_(True))
    step, state, out, advanced = jax.lax.while_loop(goes_on, body, init)
    # No sequence could go on: each running one waits for pages that only running ones hold.
    stuck = ~advanced & (state.status == RUNNING)
    state = dataclasses.replace(state, status=jnp.where(stuck, STARVED, state.status))
    return state, out, step


def _take(tokens: jax.Array, place: jax.Array) -> jax.Array:
    """Tokens at `place`, `i32[batch, n]`; where there is none, some valid token."""
    place = jnp.minimum(place, tokens.shape[1] - 1)
    return jnp.maximum(jnp.take_along_axis(tokens, place, axis=1), 0)


def _logprobs_of(model: Model, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities of `tokens`, `i32[batch, n]`, after hidden states `[batch, n, hidden]`."""
    rows = math.gcd(tokens.size, LOGIT_ROWS)  # all rows at once would hold chunk * vocab logits

    def part(pair):
        logits = model.unembed(pair[0]).astype(jnp.float32)
        return _logprobs(logits, pair[1][:, None])[:, 0]

    flat = hidden.reshape(-1, rows, hidden.shape[-1]), tokens.reshape(-1, rows)
    return jax.lax.map(part, flat).reshape(tokens.shape)


def _logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities of `tokens`, `i32[rows, n]`, under logits `f32[rows, vocab]`."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.take_along_axis(logits, tokens, axis=-1) - total


def _draw(logits: jax.Array, state: GenerationState, requests: Requests) -> jax.Array:
    """The next token of each sequence, `i32[batch]`."""
    logits = adjust(
        logits,
        requests.rules,
        state.tokens,
        requests.prompt_lens,
        state.lens,
        requests.stop_ids,
    )
    keys = draw_keys(requests.seeds, state.lens - requests.prompt_lens)
    return draw(logits, requests.rules, keys)


def _record(
    out: Drawn, step: jax.Array, logits: jax.Array, token: jax.Array, advances: jax.Array
) -> Drawn:
    """Enters a step's tokens and their log-probabilities under the model's own logits."""
    new = {"tokens": jnp.where(advances, token, NO_TOKEN)}
    if out.logprobs is not None:
        new["logprobs"] = _logprobs(logits, token[:, None])[:, 0]
    if out.top_tokens is not None:
        _, likeliest = jax.lax.top_k(logits, out.top_tokens.shape[-1])
        new["top_tokens"] = likeliest.astype(jnp.int32)
        new["top_logprobs"] = _logprobs(logits, likeliest)
    filled = {name: getattr(out, name).at[:, step].set(value) for name, value in new.items()}
    return dataclasses.replace(out, **filled)


def _advance(
    state: GenerationState, token: jax.Array, advances: jax.Array, requests: Requests
) -> GenerationState:
    """Appends `token` where `advances`, and ends the sequences that are done."""
    row = jnp.arange(token.size, dtype=jnp.int32)
    place = jnp.where(advances, state.lens, state.tokens.shape[1])
    state = dataclasses.replace(
        state,
        tokens=state.tokens.at[row, place].set(token, mode="drop"),
        lens=state.lens + advances.astype(jnp.int32),
    )
    full = state.lens - requests.prompt_lens >= requests.limits
    status = jnp.where(advances & full, LENGTH, state.status)
    stops = jnp.any(token[:, None] == requests.stop_ids, axis=1)
    return _end(state, jnp.where(advances & stops, STOPPED, status), requests)


def _end(state: GenerationState, status: jax.Array, requests: Requests) -> GenerationState:
    """Sets the status of running sequences; those that end give pages back, if asked to."""
    ended = (state.status == RUNNING) & (status != RUNNING)
    status = jnp.where(ended, status, state.status)
    cache = state.cache
    if requests.releases:
        cache = jax.lax.cond(jnp.any(ended), lambda c: c.free(ended), lambda c: c, cache)
    return dataclasses.replace(state, cache=cache, status=status)
