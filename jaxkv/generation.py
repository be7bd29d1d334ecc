"""Batched generation: chunked prefill, then blocks of decode steps in one compiled loop.

The whole state is one pytree on the device; inside a block the host does nothing.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache import KVCache
from jaxkv.config import CacheConfig, LayerSpec, cdiv
from jaxkv.keep import Keep
from jaxkv.sampling import Sampling, sample
from pallas_kernels.backends import Backend

RUNNING, STOPPED, LENGTH, STARVED = range(4)
STOP_REASONS = ("running", "stop", "length", "no_pages")
NO_TOKEN = -1  # in a block's output: this sequence did not advance in this step
# Tables and prompts come in steps of so many tokens: lengths near each other share a program.
TABLE_STEP = 256


class Model(Protocol):
    """What `generate` needs of a model, a pytree of weights (`models.Decoder` is one)."""

    def __call__(self, tokens: jax.Array, cache: KVCache, *, backend: Backend | None) -> Any:
        """Returns `(hidden, cache)` of a prepared step."""
        ...

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Returns logits."""
        ...

    def layer_specs(self, keep: Keep) -> tuple[LayerSpec, ...]:
        """Describes the layers to the cache."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns; lists have one entry a prompt."""

    tokens: list[list[int]]  # generated ones, a stop token included
    stop_reasons: list[str]  # "stop", "length" or "no_pages"
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    prompt_tokens: int  # of all prompts
    bytes_peak: int  # of the pages in use when most were
    bytes_reserved: int
    config: CacheConfig

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second, the first token's sampling included."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_speed(self) -> float:
        """Tokens per second of all sequences, without each one's first, which prefill made."""
        decoded = sum(len(t) for t in self.tokens) - len(self.tokens)
        return max(decoded, 0) / max(self.decode_seconds, 1e-9)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationState:
    """Everything that a step changes."""

    cache: KVCache
    token: jax.Array  # i32[batch], sampled last, not yet in the cache
    produced: jax.Array  # i32[batch], tokens sampled
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
    """Feeds each sequence the next `chunk` tokens of its prompt, or the fewer that are left.

    Args:
      model: weights.
      cache: donated; its lengths tell how much of each prompt is in.
      last: `[batch, hidden]`, donated, hidden state of each prompt's last token, once it is known.
      prompts: `i32[batch, tokens]`, padded at the end.
      prompt_lens: `i32[batch]`.
      chunk: tokens a call, at most the cache's `max_new_tokens`.
      backend: of the attention.

    Returns:
      The new cache, `last`, `i32[stores]`, pages in use while the chunk was attended, and `i32[]`,
      tokens of all sequences in the cache now.
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
def start(
    model: Model,
    cache: KVCache,
    last: jax.Array,
    sampling: Sampling,
    seed: jax.Array,
    stop_ids: jax.Array,
    limit: jax.Array,
) -> GenerationState:
    """Samples each sequence's first token from the hidden state of its prompt's last."""
    state = GenerationState(
        cache=cache,
        token=jnp.zeros_like(cache.lengths),
        produced=jnp.zeros_like(cache.lengths),
        status=jnp.full_like(cache.lengths, RUNNING),
        peak_pages=cache.pages_in_use,
    )
    advances = jnp.ones(cache.config.batch, bool)
    return _advance(model, state, last, advances, sampling, seed, stop_ids, limit)


@functools.partial(jax.jit, static_argnames=("steps", "backend"), donate_argnames=("state",))
def decode_block(
    model: Model,
    state: GenerationState,
    sampling: Sampling,
    seed: jax.Array,
    stop_ids: jax.Array,
    limit: jax.Array,
    *,
    steps: int,
    backend: Backend | None,
) -> tuple[GenerationState, jax.Array, jax.Array]:
    """Runs up to `steps` decode steps in one `while_loop`, fewer when no sequence is left.

    Args:
      model: weights.
      state: donated.
      sampling: how to draw.
      seed: `u32[]`.
      stop_ids: `i32[n]`, tokens that end a sequence.
      limit: `i32[batch]`, most tokens of each sequence.
      steps: at most so many.
      backend: of the attention.

    Returns:
      The new state; `i32[batch, steps]` sampled tokens, `NO_TOKEN` where a sequence had ended or
      starved; steps run.
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
        state = _advance(model, state, hidden[:, 0], advances, sampling, seed, stop_ids, limit)
        sampled = jnp.where(advances, state.token, NO_TOKEN)
        return step + 1, state, out.at[:, step].set(sampled), jnp.any(advances)

    out = jnp.full((state.token.size, steps), NO_TOKEN, jnp.int32)
    init = (jnp.int32(0), state, out, jnp.bool_(True))
    step, state, out, advanced = jax.lax.while_loop(goes_on, body, init)
    # Nobody could go on: every running sequence waits for a page that only they could free.
    stuck = ~advanced & (state.status == RUNNING)
    state = dataclasses.replace(state, status=jnp.where(stuck, STARVED, state.status))
    return state, out, step


def _advance(
    model, state: GenerationState, hidden, advances, sampling, seed, stop_ids, limit
) -> GenerationState:
    """Samples from `hidden`, `[batch, hidden]`, and ends sequences that are done."""
    key = jax.random.key(seed)
    row = jnp.arange(state.token.size, dtype=jnp.int32)
    keys = jax.vmap(lambda b, n: jax.random.fold_in(jax.random.fold_in(key, b), n))(
        row, state.produced
    )
    drawn = sample(model.unembed(hidden), sampling, keys)
    token = jnp.where(advances, drawn, state.token)
    produced = state.produced + advances.astype(jnp.int32)
    status = jnp.where(advances & (produced >= limit), LENGTH, state.status)
    stops = jnp.any(token[:, None] == stop_ids[None], axis=1)
    status = jnp.where(advances & stops, STOPPED, status)
    ended = (state.status == RUNNING) & (status != RUNNING)
    cache = jax.lax.cond(jnp.any(ended), lambda c: c.free(ended), lambda c: c, state.cache)
    return dataclasses.replace(state, cache=cache, token=token, produced=produced, status=status)


def default_chunk(prompts: int, pages: int | None, platform: str) -> int:
    """Prompt tokens of a step: on a GPU or TPU enough for about 1024 of all prompts, else 256.

    A longer chunk needs more pages of windowed layers than a caller's cap (`pages`) may leave.
    """
    if platform == "cpu" or pages is not None:
        return 256
    return max(256, 1024 // max(1, prompts) // 64 * 64)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    keep: Keep = Keep(),
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    key_means: Sequence[jax.Array] | None = None,
    page_size: int = 64,
    pages: int | None = None,
    chunk: int | None = None,
    block: int = 16,
    backend: Backend | None = None,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generation:
    """Generates a continuation of every prompt, side by side.

    Args:
      model: `models.load(...)`, or anything with its three methods.
      prompts: token ids, each at least one; unequal lengths are fine.
      keep: which tokens the cache keeps and how it stores them.
      max_tokens: most tokens of each continuation.
      sampling: None or `Sampling()` is greedy, the same tokens whatever else is in the batch (on a
        GPU or TPU but for rounding: shapes of products and the default `chunk` follow the batch).
      seed: of the draws.
      stop_ids: tokens that end a sequence (they are part of the output); None for the model's.
      key_means: of every layer, for a codec with `key_mean="static"`, see `fit_key_means`.
      page_size: tokens a page.
      pages: cap on each pool of the cache; None reserves for the worst case.
      chunk: most prompt tokens of one step; None for 256, on a GPU or TPU up to 1024 where prompts
        are few and `pages` is None: they fill the chip better and take more pages of windows.
      block: decode steps between two looks of the host (`on_tokens`).
      backend: of the attention; None picks by platform.
      on_tokens: called after each block with every sequence's new tokens.
      on_prefill: called after each chunk with (prompt tokens done, of how many).

    Raises:
      ValueError: an empty prompt or a token out of range, a bad option, prompts that do not fit
        the model's trained context or the pages.
    """
    sampling = (sampling or Sampling()).checked()
    if chunk is None:
        chunk = default_chunk(len(prompts), pages, jax.default_backend())
    lens = _checked_lengths(prompts, model, max_tokens, seed, keep.window, chunk, block)
    chunk = min(chunk, 1 << (max(lens) - 1).bit_length())
    config = CacheConfig(
        layers=model.layer_specs(keep),
        batch=len(prompts),
        max_tokens=cdiv(max(lens) + max_tokens, TABLE_STEP) * TABLE_STEP,
        max_new_tokens=chunk,
        page_size=page_size,
        pages=pages,
    ).checked()
    padded = np.zeros((len(prompts), cdiv(max(lens), TABLE_STEP) * TABLE_STEP), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    if stop_ids is None:
        stop_ids = getattr(getattr(model, "config", None), "eos_ids", ())
    draw = (
        sampling,
        jnp.uint32(seed),
        jnp.asarray(stop_ids, jnp.int32),
        jnp.full(len(prompts), max_tokens, jnp.int32),
    )
    cache = KVCache.create(config, key_means=key_means)
    compile_seconds = -time.perf_counter()
    _compile(model, cache, padded, draw, chunk, block, backend)
    compile_seconds += time.perf_counter()

    prefill_seconds = -time.perf_counter()
    cache, last, peak = _prefill(model, cache, padded, lens, chunk, backend, on_prefill)
    reserved, page_bytes = cache.bytes_reserved, cache.page_bytes
    state = start(model, cache, last, *draw)
    tokens = [[int(t)] for t in np.asarray(state.token)]
    prefill_seconds += time.perf_counter()
    if on_tokens is not None:
        on_tokens([list(t) for t in tokens])

    decode_seconds, decode_steps = -time.perf_counter(), 0
    while (np.asarray(state.status) == RUNNING).any():
        state, out, steps = decode_block(model, state, *draw, steps=block, backend=backend)
        new = [[int(t) for t in row if t != NO_TOKEN] for row in np.asarray(out)]
        decode_steps += int(steps)
        for have, more in zip(tokens, new, strict=True):
            have += more
        if on_tokens is not None:
            on_tokens(new)
    decode_seconds += time.perf_counter()
    peak = np.maximum(peak, np.asarray(state.peak_pages))
    return Generation(
        tokens=tokens,
        stop_reasons=[STOP_REASONS[s] for s in np.asarray(state.status)],
        compile_seconds=compile_seconds,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        decode_steps=decode_steps,
        prompt_tokens=sum(lens),
        bytes_peak=sum(int(n) * b for n, b in zip(peak, page_bytes, strict=True)),
        bytes_reserved=reserved,
        config=config,
    )


def _checked_lengths(prompts, model, max_tokens, seed, window, chunk, block) -> list[int]:
    """Lengths of the prompts, after every check that needs no cache."""
    for name, value in (("max_tokens", max_tokens), ("chunk", chunk), ("block", block)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{seed=} must be at least 0 and below 2**32.")
    if not prompts:
        raise ValueError("prompts is empty: give at least one.")
    config = getattr(model, "config", None)
    vocab = getattr(config, "vocab_size", None)
    context = getattr(config, "max_position", None) if window is None else None
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: it needs at least one token.")
        if vocab is not None and not all(0 <= t < vocab for t in prompt):
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise ValueError(f"prompt {number} has token {bad}, and vocab_size={vocab}.")
        if context is not None and len(prompt) + max_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, with {max_tokens=} more than the "
                f"{context} the model was trained on: shorten it, lower max_tokens, or stream "
                "with a window and sink_tokens."
            )
    return [len(prompt) for prompt in prompts]


def _prefill(model, cache, padded, lens, chunk, backend, on_prefill):
    """Feeds the prompts chunk by chunk; returns the cache, hidden states and most pages used."""
    prompts, prompt_lens = jnp.asarray(padded), jnp.asarray(lens, jnp.int32)
    last = _no_hidden(model, len(lens))
    total, unread = sum(lens), []
    done, peak, step = 0, 0, 0
    while done < total:
        cache, last, used, fed = prefill_chunk(
            model, cache, last, prompts, prompt_lens, chunk=chunk, backend=backend
        )
        step += 1
        unread.append((used, fed))
        # Read a chunk late, so that the device has the next one while the host looks; but once the
        # prompts may be done (not if some sequence had to wait for pages), know before going on.
        late = 1 if step * chunk < max(lens) else 0
        while len(unread) > late:
            used, fed = unread.pop(0)
            peak = np.maximum(peak, np.asarray(used))
            before, done = done, int(fed)
            if done == before:
                held = [s.pages - 1 for group in cache.config.groups for s in group.stores]
                raise ValueError(
                    f"prompts of {total} tokens do not fit pools of {held} pages of "
                    f"{cache.config.page_size} tokens: raise pages or use fewer prompts."
                )
            if on_prefill is not None:
                on_prefill(done, total)
    return cache, last, peak


def _no_hidden(model, batch: int) -> jax.Array:
    table = model.embedding[...]
    return jnp.zeros((batch, table.shape[1]), table.dtype)


def _compile(model, cache, padded, draw, chunk, block, backend) -> None:
    """Compiles what `generate` will call, to tell its time apart; JAX keeps the programs."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    abstract = jax.tree.map(shape, cache)
    batch = padded.shape[0]
    last, lens = _no_hidden(model, batch), jnp.zeros(batch, jnp.int32)
    prefill_chunk.lower(
        model,
        abstract,
        shape(last),
        jnp.asarray(padded),
        lens,
        chunk=chunk,
        backend=backend,
    ).compile()
    start.lower(model, abstract, last, *draw).compile()
    state = jax.eval_shape(start, model, abstract, last, *draw)
    decode_block.lower(model, state, *draw, steps=block, backend=backend).compile()
