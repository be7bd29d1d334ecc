"""Whether prompts can be read with the pages there are: arithmetic, before anything is compiled."""

from collections.abc import Sequence

import numpy as np

from jaxkv.config import CacheConfig
from jaxkv.sizes import chunks
from jaxkv.store import StoreSpec


def prompts_fit(
    config: CacheConfig, lengths: Sequence[int], *, cached: Sequence[int] | None = None
) -> str | None:
    """Tells whether `generate` can read prompts with the pages that a cache has.

    Runs the steps of reading on lengths alone, by the rules of `KVCache.prepare` and `commit`:
    sequences are served in order, those that find no pages wait, windows give pages back. Answers
    take more pages; a sequence that finds none then ends as "no_pages".

    Args:
      config: of the cache, whose sequences share no pages.
      lengths: tokens of each prompt, one per sequence of the cache; all but the last are read.
      cached: tokens of each that the cache holds already; None for an empty cache.

    Returns:
      None if all can be read, else one line that says why not.
    """
    total, left = np.asarray(lengths, np.int64), np.asarray(lengths, np.int64) - 1
    held = np.zeros_like(total) if cached is None else np.asarray(cached, np.int64)
    if len(total) != config.batch or len(held) != config.batch:
        raise ValueError(f"lengths={list(lengths)} must have one entry for each of {config.batch}.")
    room = config.max_tokens
    if room is not None and total.max() > room:
        return f"a prompt of {total.max()} tokens does not fit max_tokens={room}."
    pools = [(store, store.pages - 1) for store in config.stores]
    if all(np.sum(_most_pages(store, left)) <= pages for store, pages in pools):
        return None
    plan = list(chunks(int((left - held).max()), config.max_new_tokens))
    step = 0
    while (held < left).any():
        chunk = plan[step] if step < len(plan) else plan[0]
        count = np.clip(left - held, 0, chunk)
        waits, needs = np.zeros_like(count, bool), np.zeros_like(count, bool)
        for store, pages in pools:
            needed = store.span.stop_page(held + count) - store.span.stop_page(held)
            waits |= np.cumsum(needed) > pages - np.sum(_pages(store, held))
            needs |= needed > 0
        count = np.where(waits & needs, 0, count)
        if not count.any():
            return _no_room(config, total, held)
        held, step = held + count, step + 1
    return None


def _pages(store: StoreSpec, lengths: np.ndarray) -> np.ndarray:
    """Pages that sequences of `lengths` committed tokens hold in a store."""
    span = store.span
    stop = span.stop_page(lengths)
    return np.minimum(stop, span.sink_pages) + np.maximum(stop - span.first_page(lengths), 0)


def _most_pages(store: StoreSpec, lengths: np.ndarray) -> np.ndarray:
    """At least as many pages as sequences hold on their way to `lengths`, in whatever chunks."""
    most = store.span.stop_page(lengths) - store.span.stop_page(np.zeros_like(lengths))
    return np.minimum(most, store.width + store.span.sink_pages)


def _no_room(config: CacheConfig, total: np.ndarray, held: np.ndarray) -> str:
    pools = [store.pages - 1 for store in config.stores]
    return (
        f"prompts of {total.sum()} tokens do not fit pools of {pools} pages of "
        f"{config.page_size} tokens, which are full after {held.sum()} tokens: "
        "raise pages or use fewer prompts."
    )
