"""Verifies on the host that everything in a cache agrees; for tests and for the hunt for a bug."""

from collections.abc import Iterator

import jax
import numpy as np

from jaxkv.allocator import NULL_PAGE
from jaxkv.cache import KVCache
from jaxkv.page_tables import entries
from jaxkv.store import Store


def check(cache: KVCache) -> None:
    """Verifies every invariant of a cache; reads its tables and counts back to the host.

    Lengths are within limits; each sequence holds exactly the pages that its length (and the step
    that is prepared) asks for; no page stands twice in one sequence's tables; each page is counted
    as often as tables name it; free pages are free once; no page is lost; the null page belongs to
    nobody.

    Args:
      cache: arrays, not traced; between steps or with a prepared one.

    Raises:
      ValueError: the first thing that is broken: the store, the sequence or page, what was found
        and what must be.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(cache)):
        raise ValueError("check reads values on the host: call it outside of jit.")
    for problem in _problems(cache):
        raise ValueError(problem)


def _problems(cache: KVCache) -> Iterator[str]:
    lengths, pending = np.asarray(cache.lengths), np.asarray(cache.pending)
    limit, most = cache.config.max_tokens, cache.config.max_new_tokens
    for row, (length, new) in enumerate(zip(lengths.tolist(), pending.tolist(), strict=True)):
        if length < 0 or (limit is not None and length + new > limit):
            yield f"sequence {row}: {length} tokens and {new} pending must be 0 to {limit}."
        if not 0 <= new <= most:
            yield f"sequence {row}: {new} pending tokens must be 0 to max_new_tokens={most}."
        if new and not cache.prepared:
            yield f"sequence {row}: {new} tokens are pending, and no step is prepared."
    for number, store in enumerate(cache.stores):
        yield from (f"store {number}: {text}" for text in _pool_problems(store))
        yield from (f"store {number}: {text}" for text in _table_problems(store, lengths, pending))


def _pool_problems(store: Store) -> Iterator[str]:
    pool, pages = store.pool, store.spec.pages
    free_pages, references = int(pool.free_pages), np.asarray(pool.references)
    if not 0 <= free_pages < pages:
        yield f"free_pages={free_pages} must be 0 to {pages - 1}."
        return
    stack = np.asarray(pool.free_stack)[:free_pages]
    named = np.asarray(entries(store.tables))
    if ((named < 0) | (named >= pages)).any():
        yield f"tables name page {int(named[(named < 0) | (named >= pages)][0])} of {pages}."
        return
    counted = np.bincount(named[named != NULL_PAGE], minlength=pages)
    for page in np.flatnonzero(counted != references):
        yield (
            f"page {page} is counted {references[page]} times, and tables name it {counted[page]} "
            "times."
        )
    ids, times = np.unique(stack, return_counts=True)
    if (times > 1).any():
        yield f"page {int(ids[times > 1][0])} is free twice."
    if ((ids <= NULL_PAGE) | (ids >= pages)).any():
        yield f"pages {ids.min()} to {ids.max()} are free, and must be 1 to {pages - 1}."
        return
    for page in ids[references[ids] > 0]:
        yield f"page {page} is free, and {references[page]} tables name it."
    if free_pages + int((references > 0).sum()) != pages - 1:
        yield f"{pages - 1 - free_pages - int((references > 0).sum())} pages are lost."


def _table_problems(store: Store, lengths: np.ndarray, pending: np.ndarray) -> Iterator[str]:
    span, tables = store.spec.span, store.tables
    ring = np.asarray(tables.ring)
    sinks = np.zeros((len(lengths), 0), int) if tables.sinks is None else np.asarray(tables.sinks)
    first = np.asarray(span.first_page(jax.numpy.asarray(lengths)))
    stop = np.asarray(span.stop_page(jax.numpy.asarray(lengths + pending)))
    for row in range(len(lengths)):
        held = np.concatenate([sinks[row], ring[row]])
        held = held[held != NULL_PAGE].tolist()
        if len(set(held)) != len(held):
            yield f"sequence {row} holds a page twice: {held}."
        # An empty sequence holds nothing, a run begins behind the pinned pages.
        pinned = np.arange(sinks.shape[1]) < stop[row]
        run = np.zeros(ring.shape[1], bool)
        if not span.sinks_only:
            begin = max(int(first[row]), sinks.shape[1])
            run[np.arange(begin, max(begin, int(stop[row]))) % ring.shape[1]] = True
        for name, table, wanted in (("sinks", sinks[row], pinned), ("ring", ring[row], run)):
            wrong = np.flatnonzero((table != NULL_PAGE) != wanted)
            if wrong.size:
                slot = int(wrong[0])
                must = "must hold a page" if wanted[slot] else "must be empty"
                yield f"sequence {row}: slot {slot} of its {name} {must}, and names {table[slot]}."
