"""The host's part of generation, as an iterator: chunks of the prompts, then blocks of steps."""

import contextlib
import functools
import time
from collections.abc import Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache import KVCache
from jaxkv.filled_cache import FilledCache
from jaxkv.generation import Generation
from jaxkv.keep import Keep
from jaxkv.model import Model
from jaxkv.request import Request, on_device
from jaxkv.sizes import Sizes, chunks
from jaxkv.steps import (
    NO_TOKEN,
    RUNNING,
    STOP_REASONS,
    STOPPED,
    Drawn,
    GenerationState,
    decode_block,
    prefill_chunk,
    start,
)
from pallas_kernels.backends import Backend
from pallas_kernels.shapes import cdiv

STREAM_STEP = 4096  # room for tokens beyond the cache's tables grows by this much


class Stream(Iterator[list[list[int]]]):
    """Yields the new tokens of every prompt, block by block; made by `jaxkv.stream`.

    While the prompts are read it yields empty lists, once per chunk. Nothing runs between two
    calls of `next`, so to stop early is to call `close()`, or to leave a `with` block or the last
    reference behind. `result` tells the rest once the stream is exhausted or closed.

    Attributes:
      prompt_done: tokens of the prompts that are in the cache; their last ones are fed with the
        first step of decoding, and count then.
      prompt_total: tokens of all prompts.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        cache: KVCache,
        *,
        cached: Sequence[int],
        keep: Keep,
        sizes: Sizes,
        backend: Backend | None,
    ):
        self._model, self._requests, self._cache = model, requests, cache
        self._cached, self._keep, self._sizes, self._backend = cached, keep, sizes, backend
        self._config, self._page_bytes = cache.config, cache.page_bytes
        self._reserved = cache.bytes_reserved
        self._device = on_device(requests, releases=sizes.pages is not None)
        self._lens = [len(request.prompt) for request in requests]
        self._state: GenerationState | None = None
        self._prompt_logprobs: jax.Array | None = None
        self._drawn: list[list[int]] = [[] for _ in requests]  # everything that was drawn
        self._tokens: list[list[int]] = [[] for _ in requests]  # up to strings that end answers
        self._reasons = np.full(len(requests), RUNNING)
        self._logprobs: list[list[float]] = [[] for _ in requests]
        self._tops: list[list[dict[int, float]]] = [[] for _ in requests]
        self._peak = np.zeros(len(cache.page_bytes), np.int32)
        self._steps = 0
        self._seconds: dict[str, float] = dict(compile=0.0, prefill=0.0, decode=0.0)
        self.prompt_done, self.prompt_total = sum(cached), sum(self._lens)
        self._closed = False
        self._work = self._run()

    def __next__(self) -> list[list[int]]:
        return next(self._work)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stops the work; `result` then has what was generated before."""
        self._work.close()
        self._closed = True

    @functools.cached_property
    def result(self) -> Generation:
        """Everything that was generated, with times and bytes.

        Raises:
          ValueError: the stream is neither exhausted nor closed.
        """
        if not self._closed:
            raise ValueError("the stream is still running: exhaust it or close it before `result`.")
        cache = self._cache if self._state is None else self._state.cache
        if self._state is not None:
            self._peak = np.maximum(self._peak, np.asarray(self._state.peak_pages))
        asked = [request.sampling for request in self._requests]
        return Generation(
            tokens=self._tokens,
            stop_reasons=[
                "closed" if reason == RUNNING else STOP_REASONS[reason] for reason in self._reasons
            ],
            texts=self._texts(),
            logprobs=[
                None if one.logprobs is None else own[: len(tokens)]
                for one, own, tokens in zip(asked, self._logprobs, self._tokens, strict=True)
            ],
            top_logprobs=[
                None
                if not one.logprobs
                else [_first(top, one.logprobs) for top in own[: len(tokens)]]
                for one, own, tokens in zip(asked, self._tops, self._tokens, strict=True)
            ],
            prompt_logprobs=self._read_prompt_logprobs(),
            cached_tokens=list(self._cached),
            compile_seconds=self._seconds["compile"],
            prefill_seconds=self._seconds["prefill"],
            decode_seconds=self._seconds["decode"],
            decode_steps=self._steps,
            prompt_tokens=self.prompt_total,
            bytes_peak=sum(
                int(pages) * size for pages, size in zip(self._peak, self._page_bytes, strict=True)
            ),
            bytes_reserved=self._reserved,
            config=self._config,
            cache=FilledCache(
                kv=cache, tokens=self._held(cache), keep=self._keep, sizes=self._sizes
            ),
        )

    def _run(self) -> Generator[list[list[int]]]:
        prompts = self._padded()
        with self._timed("compile"):
            self._compile(prompts)
        yield from self._read_prompts(prompts)
        self._state = start(self._cache, prompts, self._device)
        self.prompt_done = self.prompt_total
        with self._timed("prefill"):
            new = self._decode(steps=1)
        yield new
        while (self._reasons == RUNNING).any():
            with self._timed("decode"):
                before = self._steps
                new = self._decode(steps=self._sizes.block)
                assert self._steps > before or (self._reasons != RUNNING).all()
            yield new
        self._closed = True

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Adds the seconds that the body takes."""
        began = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - began

    def _padded(self) -> jax.Array:
        """The prompts as `i32[batch, width]`, with room for the answers."""
        longest = max(len(r.prompt) + r.max_tokens for r in self._requests)
        room = self._config.max_tokens or cdiv(longest, STREAM_STEP) * STREAM_STEP
        padded = np.full((len(self._requests), room), NO_TOKEN, np.int32)
        for row, request in zip(padded, self._requests, strict=True):
            row[: len(request.prompt)] = request.prompt
        return jnp.asarray(padded)

    def _left(self) -> int:
        """Most tokens of a prompt that are still to be read before decoding begins."""
        return max(length - 1 - held for length, held in zip(self._lens, self._cached, strict=True))

    def _compile(self, prompts: jax.Array) -> None:
        """Compiles the steps, to time this separately; JAX keeps the programs."""
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        cache = jax.tree.map(shape, self._cache)
        if any(request.sampling.prompt_logprobs for request in self._requests):
            self._prompt_logprobs = jnp.full(prompts.shape, jnp.nan, jnp.float32)
        options = dict(backend=self._backend)
        for chunk in dict.fromkeys(chunks(self._left(), self._config.max_new_tokens)):
            prefill_chunk.lower(
                self._model,
                cache,
                self._prompt_logprobs,
                prompts,
                self._device.prompt_lens,
                chunk=chunk,
                **options,
            ).compile()
        state = jax.eval_shape(start, cache, prompts, self._device)
        ended = jax.ShapeDtypeStruct((len(self._requests),), jnp.bool)
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        decode_block.lower(
            self._model, state, self._device, ended, steps, block=self._sizes.block, **options
        ).compile()

    def _read_prompts(self, prompts: jax.Array) -> Iterator[list[list[int]]]:
        """Feeds the prompts chunk by chunk, all but the last token of each."""
        total = self.prompt_total - len(self._lens)
        plan = list(chunks(self._left(), self._config.max_new_tokens))
        step, unread, done = 0, [], sum(self._cached)
        while done < total:
            with self._timed("prefill"):
                # Sequences that wait for pages need more steps than the plan has.
                chunk = plan[step] if step < len(plan) else plan[0]
                self._cache, self._prompt_logprobs, used, fed = prefill_chunk(
                    self._model,
                    self._cache,
                    self._prompt_logprobs,
                    prompts,
                    self._device.prompt_lens,
                    chunk=chunk,
                    backend=self._backend,
                )
                step += 1
                unread.append((used, fed))
                # The host reads each result one chunk late, so that the device is never idle. Once
                # the plan has run it reads at once: the prompts are done, or some sequences wait
                # for pages, perhaps for ever.
                late = 1 if step < len(plan) else 0
                while len(unread) > late:
                    used, fed = unread.pop(0)
                    self._peak = np.maximum(self._peak, np.asarray(used))
                    before, done = done, int(fed)
                    assert done > before, "prompts_fit has seen that the prompts fit"
                self.prompt_done = done
            yield [[] for _ in self._requests]

    def _decode(self, steps: int) -> list[list[int]]:
        """Runs a block of decode steps; returns every sequence's new tokens."""
        assert self._state is not None
        ended = jnp.asarray(self._reasons != RUNNING)
        state, out, ran = decode_block(
            self._model,
            self._state,
            self._device,
            ended,
            jnp.int32(min(steps, self._sizes.block)),
            block=self._sizes.block,
            backend=self._backend,
        )
        self._state = state
        self._steps += int(ran)
        status, out = np.asarray(state.status), jax.tree.map(np.asarray, out)
        return [self._take(row, int(status[row]), out) for row in range(len(self._requests))]

    def _take(self, row: int, status: int, out: Drawn) -> list[int]:
        """Takes what a block has drawn for one sequence; returns its new tokens."""
        if self._reasons[row] != RUNNING:
            return []
        places = np.flatnonzero(out.tokens[row] != NO_TOKEN)
        new = out.tokens[row][places].tolist()
        if out.logprobs is not None:
            self._logprobs[row] += out.logprobs[row][places].tolist()
        if out.top_tokens is not None and out.top_logprobs is not None:
            tops = zip(out.top_tokens[row][places], out.top_logprobs[row][places], strict=True)
            self._tops[row] += [dict(zip(t.tolist(), p.tolist(), strict=True)) for t, p in tops]
        self._reasons[row] = status
        self._drawn[row] += new
        stop_text, least = self._requests[row].stop_text, self._requests[row].sampling.min_tokens
        if stop_text is not None:
            stop = stop_text.find(self._drawn[row], len(new), least)
            if stop is not None:
                new = new[: stop - len(self._tokens[row])]
                self._reasons[row] = STOPPED
        self._tokens[row] += new
        return new

    def _texts(self) -> list[str] | None:
        if self._requests[0].stop_text is None:
            return None
        return [
            request.stop_text.text(tokens, request.sampling.min_tokens)
            if request.stop_text is not None
            else ""
            for request, tokens in zip(self._requests, self._tokens, strict=True)
        ]

    def _read_prompt_logprobs(self) -> list[list[float | None] | None]:
        if self._prompt_logprobs is None:
            return [None] * len(self._requests)
        rows = np.asarray(self._prompt_logprobs)
        return [
            [None if np.isnan(p) else float(p) for p in row[: len(request.prompt)]]
            if request.sampling.prompt_logprobs
            else None
            for request, row in zip(self._requests, rows, strict=True)
        ]

    def _held(self, cache: KVCache) -> tuple[tuple[int, ...], ...]:
        """The tokens that each sequence of the cache holds."""
        return tuple(
            tuple((request.prompt + drawn)[:length])
            for request, drawn, length in zip(
                self._requests, self._drawn, np.asarray(cache.lengths).tolist(), strict=True
            )
        )


def _first(top: dict[int, float], count: int) -> dict[int, float]:
    """The first `count` entries, which are the likeliest."""
    return dict(list(top.items())[:count])
