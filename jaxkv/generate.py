"""Batched generation, the host's part: chunks of the prompts, then blocks of decode steps."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache import KVCache
from jaxkv.config import CacheConfig
from jaxkv.keep import Keep
from jaxkv.model import Model
from jaxkv.sampling import Sampling
from jaxkv.steps import (
    NO_TOKEN,
    RUNNING,
    STOP_REASONS,
    Requests,
    decode_block,
    prefill_chunk,
    start,
)
from pallas_kernels.backends import Backend
from pallas_kernels.shapes import cdiv

# Tables and prompts are rounded up to multiples of this, so near lengths share compiled programs.
TABLE_STEP = 256
SEEDS = 2**32  # seeds are u32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the pieces that generation works in: they trade memory, speed and latency.

    Attributes:
      page_size: tokens per page. A lossy codec keeps a number of whole pages exact, so the page
        size also decides how many tokens stay exact.
      pages: cap on the pages of each pool of the cache, the null page included; None reserves for
        the worst case. With fewer, sequences share the pages there are and wait for free ones; if
        none can go on, they end as "no_pages".
      chunk: most prompt tokens per sequence and step; None for `default_chunk`. Long chunks fill
        the chip better and take more pages of windowed layers.
      block: decode steps per call of the host, which then reports tokens (`on_tokens`).
    """

    page_size: int = 64
    pages: int | None = None
    chunk: int | None = None
    block: int = 16

    def checked(self) -> "Sizes":
        """Returns itself; raises ValueError for a size below 1 (pages: see `CacheConfig`)."""
        for name in ("page_size", "chunk", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The result of `generate`; lists have one entry per prompt."""

    tokens: list[list[int]]  # generated tokens, a stop token included
    stop_reasons: list[str]  # "stop", "length" or "no_pages"
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    prompt_tokens: int  # tokens of all prompts
    bytes_peak: int  # bytes of the most pages in use at a time, each store's peak summed
    bytes_reserved: int  # bytes of the whole cache
    config: CacheConfig  # configuration of the cache

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second, the first token's sampling included."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_speed(self) -> float:
        """Tokens of all sequences per second, without each one's first, which prefill samples."""
        decoded = sum(len(t) for t in self.tokens) - len(self.tokens)
        return max(decoded, 0) / max(self.decode_seconds, 1e-9)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    keep: Keep = Keep(),
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | None = None,
    key_means: Sequence[jax.Array] | None = None,
    sizes: Sizes = Sizes(),
    backend: Backend | None = None,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generation:
    """Generates a continuation of every prompt, side by side.

    A prompt's tokens do not depend on the other prompts, nor on its row in the batch: greedy tokens
    follow from the prompt, sampled ones from the prompt and its seed. On a GPU or TPU rounding can
    still change a token, because the shapes of products and the default `chunk` depend on the
    batch.

    Args:
      model: `models.load(...)`, or anything that `Model` describes.
      prompts: token ids, at least one per prompt; unequal lengths are fine.
      keep: which tokens the cache keeps and how it stores them.
      max_tokens: most tokens of each continuation.
      sampling: how tokens are drawn; None or `Sampling()` is greedy.
      seed: seeds of the draws, below 2**32, one per prompt; an int `s` gives prompt `i` the seed
        `s + i` (modulo 2**32), so that equal prompts continue differently.
      stop_ids: tokens that end a sequence (they are part of the output); None for the model's.
      key_means: `[kv_heads, head_dim]` for every layer, for a codec with `key_mean="static"`; see
        `fit_key_means`.
      sizes: sizes of pages, chunks and blocks.
      backend: backend of the attention; None picks by platform.
      on_tokens: called after each block with every sequence's new tokens.
      on_prefill: called after each chunk with the prompt tokens done and their total.

    Returns:
      Tokens and stop reasons of every prompt, with times and bytes.

    Raises:
      ValueError: an empty prompt or a token out of range, a bad option, or prompts that do not fit
        the model's trained context or the pages.
      NotImplementedError: the named backend does not serve the model's attention.
    """
    lens = _checked_lengths(model, prompts, max_tokens, keep)
    requests = Requests(
        seeds=jnp.asarray(prompt_seeds(seed, len(prompts)), jnp.uint32),
        limits=jnp.full(len(prompts), max_tokens, jnp.int32),
        stop_ids=_same_for_all(model.eos_ids if stop_ids is None else stop_ids, len(prompts)),
        sampling=(sampling or Sampling()).checked(),
    )
    config = _cache_config(model, keep, sizes.checked(), lens, max_tokens)
    cache = KVCache.create(config, key_means=key_means)
    return _run(model, cache, prompts, requests, sizes.block, backend, on_tokens, on_prefill)


def _checked_lengths(
    model: Model, prompts: Sequence[Sequence[int]], max_tokens: int, keep: Keep
) -> list[int]:
    """Lengths of the prompts, after every check that needs no cache."""
    if max_tokens < 1:
        raise ValueError(f"{max_tokens=} must be at least 1.")
    if not prompts:
        raise ValueError("prompts is empty: give at least one.")
    vocab_size = model.vocab_size
    context = model.max_position if keep.window is None else None
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: it needs at least one token.")
        bad = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise ValueError(f"prompt {number} has token {bad}, and {vocab_size=}.")
        if context is not None and len(prompt) + max_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, with {max_tokens=} more than the "
                f"{context} the model was trained on: shorten it, lower max_tokens, or stream "
                "with a window and sink_tokens."
            )
    return [len(prompt) for prompt in prompts]


def prompt_seeds(seed: int | Sequence[int], prompts: int) -> list[int]:
    """One seed per prompt: the given ones, or counted up from an int (modulo 2**32).

    Raises:
      ValueError: a seed is out of range, or there are not as many as prompts.
    """
    given = np.atleast_1d(np.asarray(seed)).tolist()
    for value in given:
        if not 0 <= value < SEEDS:
            raise ValueError(f"seed={value} must be at least 0 and below 2**32.")
    if np.ndim(seed) == 0:
        return [(given[0] + number) % SEEDS for number in range(prompts)]
    if len(given) != prompts:
        raise ValueError(f"seed has {len(given)} entries and must have one per prompt, {prompts}.")
    return given


def _same_for_all(stop_ids: Sequence[int], batch: int) -> jax.Array:
    """The same stop tokens for each request, `i32[batch, n]`."""
    return jnp.tile(jnp.asarray(stop_ids, jnp.int32)[None], (batch, 1))


def _cache_config(
    model: Model, keep: Keep, sizes: Sizes, lens: list[int], max_tokens: int
) -> CacheConfig:
    """Configures a cache for prompts of `lens` tokens, each continued by up to `max_tokens`."""
    chunk = sizes.chunk or default_chunk(len(lens), sizes.pages, jax.default_backend())
    return CacheConfig(
        layers=model.layer_specs(keep),
        batch=len(lens),
        max_tokens=cdiv(max(lens) + max_tokens, TABLE_STEP) * TABLE_STEP,
        max_new_tokens=min(chunk, 1 << (max(lens) - 1).bit_length()),
        page_size=sizes.page_size,
        pages=sizes.pages,
    ).checked()


def default_chunk(prompts: int, pages: int | None, platform: str) -> int:
    """Most prompt tokens per sequence and step, at least 256.

    On a GPU or TPU it is more for fewer than 4 prompts: about 1024 tokens of all prompts together.
    With a cap on pages (`pages`) it stays 256, as longer chunks need more pages of windowed layers.
    """
    if platform == "cpu" or pages is not None:
        return 256
    return max(256, 1024 // max(1, prompts) // 64 * 64)


def _run(
    model: Model,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    requests: Requests,
    block: int,
    backend: Backend | None,
    on_tokens: Callable[[list[list[int]]], None] | None,
    on_prefill: Callable[[int, int], None] | None,
) -> Generation:
    """Compiles, reads the prompts and decodes until every sequence has ended; times each part."""
    lens, padded = [len(prompt) for prompt in prompts], _padded(prompts)
    config, reserved, page_bytes = cache.config, cache.bytes_reserved, cache.page_bytes
    seconds: dict[str, float] = {}
    with _timed(seconds, "compile_seconds"):
        _compile(model, cache, padded, requests, block, backend)
    with _timed(seconds, "prefill_seconds"):
        cache, last, peak = _prefill(model, cache, padded, lens, backend, on_prefill)
        state = start(model, cache, last, requests)
        tokens = [[int(token)] for token in np.asarray(state.token)]
    if on_tokens is not None:
        on_tokens([list(first) for first in tokens])
    decode_steps = 0
    with _timed(seconds, "decode_seconds"):
        while (np.asarray(state.status) == RUNNING).any():
            state, out, steps = decode_block(model, state, requests, steps=block, backend=backend)
            new = [[int(token) for token in row if token != NO_TOKEN] for row in np.asarray(out)]
            decode_steps += int(steps)
            for have, more in zip(tokens, new, strict=True):
                have += more
            if on_tokens is not None:
                on_tokens(new)
    peak = np.maximum(peak, np.asarray(state.peak_pages))
    return Generation(
        tokens=tokens,
        stop_reasons=[STOP_REASONS[status] for status in np.asarray(state.status)],
        decode_steps=decode_steps,
        prompt_tokens=sum(lens),
        bytes_peak=sum(int(n) * size for n, size in zip(peak, page_bytes, strict=True)),
        bytes_reserved=reserved,
        config=config,
        **seconds,
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Stores the seconds that the body takes under `name`."""
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def _padded(prompts: Sequence[Sequence[int]]) -> jax.Array:
    """The prompts as `i32[batch, tokens]`, zeros behind each."""
    longest = max(len(prompt) for prompt in prompts)
    padded = np.zeros((len(prompts), cdiv(longest, TABLE_STEP) * TABLE_STEP), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(padded)


def _compile(
    model: Model,
    cache: KVCache,
    prompts: jax.Array,
    requests: Requests,
    block: int,
    backend: Backend | None,
) -> None:
    """Compiles the steps of `generate`, to time this separately; JAX keeps the programs."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    abstract, batch = jax.tree.map(shape, cache), cache.config.batch
    last, lens = shape(_no_hidden(model, batch)), jax.ShapeDtypeStruct((batch,), jnp.int32)
    chunk = cache.config.max_new_tokens
    prefill_chunk.lower(
        model, abstract, last, prompts, lens, chunk=chunk, backend=backend
    ).compile()
    start.lower(model, abstract, last, requests).compile()
    state = jax.eval_shape(start, model, abstract, last, requests)
    decode_block.lower(model, state, requests, steps=block, backend=backend).compile()


def _prefill(
    model: Model,
    cache: KVCache,
    prompts: jax.Array,
    lens: list[int],
    backend: Backend | None,
    on_prefill: Callable[[int, int], None] | None,
) -> tuple[KVCache, jax.Array, np.ndarray]:
    """Feeds the prompts chunk by chunk; returns the cache, hidden states and most pages used."""
    prompt_lens, last = jnp.asarray(lens, jnp.int32), _no_hidden(model, len(lens))
    chunk, total, unread = cache.config.max_new_tokens, sum(lens), []
    done, peak, step = 0, np.zeros(1, np.int32), 0
    while done < total:
        cache, last, used, fed = prefill_chunk(
            model, cache, last, prompts, prompt_lens, chunk=chunk, backend=backend
        )
        step += 1
        unread.append((used, fed))
        # The host reads each result one chunk late, so that the device is never idle. Once enough
        # chunks have run for the longest prompt it reads at once: the prompts are done, or some
        # sequences wait for pages, perhaps for ever.
        late = 1 if step * chunk < max(lens) else 0
        while len(unread) > late:
            used, fed = unread.pop(0)
            peak = np.maximum(peak, np.asarray(used))
            before, done = done, int(fed)
            if done == before:
                held = [store.pages - 1 for store in cache.config.stores]
                raise ValueError(
                    f"prompts of {total} tokens do not fit pools of {held} pages of "
                    f"{cache.config.page_size} tokens: raise pages or use fewer prompts."
                )
            if on_prefill is not None:
                on_prefill(done, total)
    return cache, last, peak


def _no_hidden(model: Model, batch: int) -> jax.Array:
    """Zeros in place of each prompt's last hidden state."""
    return jnp.zeros((batch, model.hidden_size), model.dtype)
