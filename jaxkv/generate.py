"""Batched generation through a cache: `stream` yields tokens as they come, `generate` returns all.

A prompt's tokens do not depend on the other prompts, nor on its row in the batch: greedy tokens
follow from the prompt, sampled ones from the prompt and its seed. On a GPU or TPU rounding can
still change a token, because the shapes of products and the default chunk depend on the batch.
"""

from collections.abc import Sequence

import jax

from jaxkv.cache import KVCache
from jaxkv.config import CacheConfig
from jaxkv.filled_cache import FilledCache, restart
from jaxkv.generation import Generation
from jaxkv.keep import Keep
from jaxkv.model import Model
from jaxkv.prompts_fit import prompts_fit
from jaxkv.request import Request, read_requests
from jaxkv.sampling import Sampling
from jaxkv.sizes import Sizes, cache_config
from jaxkv.stop_text import StopText
from jaxkv.stream import Stream
from pallas_kernels.backends import Backend


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    keep: Keep | None = None,
    max_tokens: int | Sequence[int] = 128,
    sampling: Sampling | Sequence[Sampling] | None = None,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stop_text: StopText | None = None,
    cache: FilledCache | None = None,
    key_means: Sequence[jax.Array] | None = None,
    sizes: Sizes | None = None,
    backend: Backend | None = None,
) -> Stream:
    """Generates a continuation of every prompt, side by side, as an iterator.

    Bad input raises here; the first `next` compiles.

    Args:
      model: `models.load(...)`, or anything that `Model` describes.
      prompts: token ids, at least one per prompt; unequal lengths are fine.
      keep: which tokens the cache keeps and how it stores them; None for the given cache's, or
        everything, exactly.
      max_tokens: most tokens of each continuation, one number or one per prompt.
      sampling: how tokens are drawn and reported, one value or one per prompt; None is greedy.
      seed: seeds of the draws, below 2**32, one per prompt; an int `s` gives prompt `i` the seed
        `s + i` (modulo 2**32), so that equal prompts continue differently.
      stop_ids: tokens that end a sequence (they are part of the output), one list or one per
        prompt; None for the model's.
      stop_text: strings that end a sequence, with the function that decodes tokens.
      cache: `Generation.cache` of an earlier call with as many prompts, whose prompt `i` this
        prompt `i` continues: tokens that the cache holds are not fed again, and the tokens
        generated are those of a call without it. A prompt that does not begin with all tokens of
        its sequence starts anew (`Generation.cached_tokens` tells). The cache grows as needed; it
        is donated.
      key_means: `[kv_heads, head_dim]` for every layer, for a codec with `key_mean="static"`; see
        `fit_key_means`. With a cache given: must be None, the cache has its own.
      sizes: sizes of pages, chunks and blocks; None for the given cache's, or `Sizes()`.
      backend: backend of the attention; None picks by platform.

    Returns:
      An iterator over lists of every prompt's new tokens, see `Stream`.

    Raises:
      ValueError: an empty prompt or a token out of range, a bad option, prompts that do not fit
        the model's trained context or the pages, or a cache that can't be continued.
      NotImplementedError: the named backend does not serve the model's attention.
    """
    if cache is not None and not isinstance(cache, FilledCache):
        raise ValueError(f"cache must be a Generation.cache, not {type(cache).__name__}.")
    own = (Keep(), Sizes()) if cache is None else (cache.keep, cache.sizes)
    used_keep, used_sizes = keep or own[0], (sizes or own[1]).checked()
    requests = read_requests(
        model,
        prompts,
        keep=used_keep,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
        stop_text=None if stop_text is None else stop_text.checked(),
    )
    if cache is None:
        config = cache_config(model, used_keep, used_sizes, _totals(requests))
        cached = [0] * len(requests)
        _check_room(config, requests, cached)
        kv = KVCache.create(config, key_means=key_means)
    else:
        if key_means is not None:
            raise ValueError("key_means must be left out with a cache, which has its own.")
        cache.check(model, len(requests), keep, sizes)
        cached = cache.cached_tokens([request.prompt for request in requests])
        kv = _continued(cache, requests, cached)
    return Stream(
        model,
        requests,
        kv,
        cached=cached,
        keep=used_keep,
        sizes=used_sizes,
        backend=backend,
    )


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    keep: Keep | None = None,
    max_tokens: int | Sequence[int] = 128,
    sampling: Sampling | Sequence[Sampling] | None = None,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stop_text: StopText | None = None,
    cache: FilledCache | None = None,
    key_means: Sequence[jax.Array] | None = None,
    sizes: Sizes | None = None,
    backend: Backend | None = None,
) -> Generation:
    """Generates a continuation of every prompt, side by side, and returns them all.

    Arguments and errors are those of `stream`.
    """
    tokens = stream(
        model,
        prompts,
        keep=keep,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
        stop_text=stop_text,
        cache=cache,
        key_means=key_means,
        sizes=sizes,
        backend=backend,
    )
    for _ in tokens:
        pass
    return tokens.result


def _totals(requests: Sequence[Request]) -> list[int]:
    """Most tokens of each sequence, prompt and answer together."""
    return [len(request.prompt) + request.max_tokens for request in requests]


def _check_room(config: CacheConfig, requests: Sequence[Request], cached: Sequence[int]) -> None:
    """Raises ValueError if the prompts can't be read with the pages there are."""
    reason = prompts_fit(config, [len(request.prompt) for request in requests], cached=cached)
    if reason is not None:
        raise ValueError(reason)


def _continued(cache: FilledCache, requests: Sequence[Request], cached: Sequence[int]) -> KVCache:
    """The cache with room for the requests, and without sequences that they do not continue."""
    config = cache.config_for(_totals(requests))
    _check_room(config, requests, cached)
    fresh = [count == 0 and len(held) > 0 for count, held in zip(cached, cache.tokens, strict=True)]
    return restart(cache.make_room(config), fresh)
