"""Verifies every invariant of a cache on the host, and names what is broken."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxkv.abstract_cache import abstract_cache
from jaxkv.allocator import NULL_PAGE
from jaxkv.cache import KVCache
from jaxkv.spans import PageSpan
from jaxkv.store import Store
from pallas_kernels.checks import shown

MOST_NAMED = 8  # broken things that a message names


def check(cache: KVCache) -> None:
    """Raises ValueError if a cache breaks an invariant; for tests and debugging, between calls.

    Holds shapes and dtypes, lengths and pending tokens, page tables, reference counts and free
    lists against each other and the configuration: no page is lost, owned by two sequences that
    could both write to it, free and in use, or the null page; every sequence holds exactly the
    pages that its length asks for; the values and factors of its tokens are finite. It copies the
    tables to the host and reads every page once on the device.

    Raises:
      ValueError: names what is broken, up to 8 things in one line; or the cache was donated.
    """
    verify(cache, finite=True)


def verify(cache: KVCache, *, finite: bool) -> None:
    """`check`, which leaves out the contents of pages without `finite`."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache must be a KVCache, not {shown(cache)}.")
    leaves = jax.tree.leaves(cache)
    if any(isinstance(x, Tracer) for x in leaves):
        raise ValueError("check runs on the host, outside of jit: the cache is traced.")
    if any(x.is_deleted() for x in leaves if isinstance(x, jax.Array)):
        raise ValueError("cache was donated to a step: use the cache that the step returned.")
    faults = list(_wrong_arrays(cache)) or [*_wrong_counts(cache), *_wrong_stores(cache, finite)]
    if faults:
        more = len(faults) - MOST_NAMED
        named = "; ".join(faults[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(f"cache is broken: {named}.")


def array_name(path) -> str:
    """Name of an array of a cache: "stores.0.tables.ring"."""
    parts = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))) for key in path)
    return ".".join(map(str, parts))


def _wrong_arrays(cache: KVCache) -> Iterator[str]:
    """Arrays that are not as the configuration says."""
    wanted = jax.tree_util.tree_leaves_with_path(abstract_cache(cache.config))
    found = jax.tree_util.tree_leaves_with_path(cache)
    wanted, found = ({array_name(path): x for path, x in leaves} for leaves in (wanted, found))
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} is no array of such a cache"
        elif (found[name].shape, found[name].dtype) != (wanted[name].shape, wanted[name].dtype):
            yield f"{name} is {shown(found[name])}, and must be {shown(wanted[name])}"


def _wrong_counts(cache: KVCache) -> Iterator[str]:
    """Lengths, pending tokens and flags that can't be."""
    config, most = cache.config, cache.config.max_tokens
    lengths, pending = np.asarray(cache.lengths), np.asarray(cache.pending)
    refused = np.asarray(cache.starved) | np.asarray(cache.too_long)
    for b in range(config.batch):
        length, new = int(lengths[b]), int(pending[b])
        if length < 0 or (most is not None and length > most):
            yield f"lengths[{b}]={length} must be at least 0 and at most max_tokens={most}"
        if not 0 <= new <= config.max_new_tokens:
            yield f"pending[{b}]={new} must be at least 0 and at most {config.max_new_tokens}"
        elif most is not None and length + new > most:
            yield f"lengths[{b}]={length} and pending[{b}]={new} exceed max_tokens={most}"
        if new and refused[b]:
            yield f"pending[{b}]={new} of a sequence that is starved or too long"
        if new and not cache.prepared:
            yield f"pending[{b}]={new}, and no step is prepared"


def _wrong_stores(cache: KVCache, finite: bool) -> Iterator[str]:
    lengths, pending = np.asarray(cache.lengths), np.asarray(cache.pending)
    for number, store in enumerate(cache.stores):
        wrong = [*_wrong_pool(store), *_wrong_tables(store, lengths, pending)]
        # Pages are found through the tables, so these must be right.
        wrong = wrong or list(_wrong_owners(store, lengths))
        if finite:
            wrong = wrong or list(_not_finite(store, lengths))
        for fault in wrong:
            yield f"stores[{number}]: {fault}"


def _wrong_pool(store: Store) -> Iterator[str]:
    """Free list, reference counts and tables hold each page once between them."""
    pages, pool = store.spec.pages, store.pool
    free_pages, references = int(pool.free_pages), np.asarray(pool.references)
    named = np.concatenate([np.asarray(table).ravel() for table in jax.tree.leaves(store.tables)])
    if ((named < 0) | (named >= pages)).any():
        yield f"page tables name page {_first(named, (named < 0) | (named >= pages))} of {pages}"
        return
    if not 0 <= free_pages < pages:
        yield f"free_pages={free_pages} must be at least 0 and below {pages}"
        return
    free = np.asarray(pool.free_stack)[:free_pages]
    if ((free < 0) | (free >= pages)).any():
        yield f"the free list has page {_first(free, (free < 0) | (free >= pages))} of {pages}"
        return
    times_free = np.bincount(free, minlength=pages)
    times_named = np.bincount(named[named != NULL_PAGE], minlength=pages)
    if times_free[NULL_PAGE] or references[NULL_PAGE]:
        yield "the null page is in the free list, or has an owner"
    rules = (
        ("is in the free list twice", times_free > 1),
        ("is free, and page tables name it", (times_free > 0) & (times_named > 0)),
        ("is lost: not free, and in no page table", (times_free == 0) & (times_named == 0)),
        ("has a reference count that differs from the page tables", references != times_named),
    )
    for fault, where in rules:
        where[NULL_PAGE] = False
        if where.any():
            page = int(np.flatnonzero(where)[0])
            count = f" ({references[page]} for {times_named[page]})" if "count" in fault else ""
            yield f"page {page} {fault}{count}"


def _first(values: np.ndarray, where: np.ndarray) -> int:
    return int(values[where][0])


def _pages_of(
    store: Store, lengths: np.ndarray, pending: np.ndarray | int = 0
) -> list[dict[int, int]]:
    """The logical pages that each sequence has, with the place of each in `_table_rows`."""
    span, width = store.spec.span, store.spec.width
    first, stop = jax.device_get(_run_of_pages(span, lengths, lengths + pending))
    out = []
    for b in range(len(lengths)):
        run = range(max(int(first[b]), span.sink_pages), int(stop[b]))
        pinned = range(min(span.sink_pages, int(stop[b])))
        out.append({g: width + g for g in pinned} | {g: g % width for g in run})
    return out


@functools.partial(jax.jit, static_argnums=0)
def _run_of_pages(
    span: PageSpan, lengths: jax.Array, stops: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return span.first_page(lengths), span.stop_page(stops)


def _table_rows(store: Store) -> np.ndarray:
    """The page ids of each sequence's ring and, behind them, of its sink pages."""
    tables = [np.asarray(table) for table in jax.tree.leaves(store.tables)]
    return np.concatenate(tables, axis=1)


def _wrong_tables(store: Store, lengths: np.ndarray, pending: np.ndarray) -> Iterator[str]:
    """Every sequence holds the pages of its committed and prepared tokens, and no others."""
    rows = _table_rows(store)
    pages = _pages_of(store, lengths, pending)
    for b, row in enumerate(rows):
        wanted = np.zeros(row.size, bool)
        wanted[list(pages[b].values())] = True
        if ((row != NULL_PAGE) & ~wanted).any():
            page = _first(row, (row != NULL_PAGE) & ~wanted)
            yield f"sequence {b} of {lengths[b]} tokens holds page {page}, which it does not need"
        if ((row == NULL_PAGE) & wanted).any():
            yield f"sequence {b} of {lengths[b]} tokens lacks a page that it needs"
        held = row[row != NULL_PAGE]
        if len(np.unique(held)) < len(held):
            yield f"sequence {b} holds a page twice"


def _wrong_owners(store: Store, lengths: np.ndarray) -> Iterator[str]:
    """Sequences share only pages that none of them writes to, each as the same logical page."""
    rows, size = _table_rows(store), store.spec.span.page_size
    references = np.asarray(store.pool.references)
    owners: dict[int, tuple[int, int]] = {}  # page: the first sequence with it, as which page
    for b, pages in enumerate(_pages_of(store, lengths)):
        whole = [slot for g, slot in pages.items() if g < int(lengths[b]) // size]
        for g, slot in pages.items():
            page = int(rows[b, slot])
            other, place = owners.setdefault(page, (b, g))
            if place != g:
                yield f"page {page} is page {place} of sequence {other}, and page {g} of {b}"
        for page in map(int, np.delete(rows[b], whole)):
            if page != NULL_PAGE and references[page] > 1:
                yield f"page {page}, which sequence {b} writes to, is shared"


def _not_finite(store: Store, lengths: np.ndarray) -> Iterator[str]:
    """Values, factors and means of committed tokens that are not finite."""
    rows, size = _table_rows(store), store.spec.span.page_size
    layout, arrays = store.pages.layout, store.pages.arrays
    bad = np.zeros((store.spec.pages, size), bool)
    for name, axis in layout.token_axes.items():
        if jnp.issubdtype(arrays[name].dtype, jnp.floating):
            rank = arrays[name].ndim
            others = tuple(a for a in range(rank) if a not in (1, axis % rank))
            bad |= ~np.asarray(_all_finite(arrays[name], others))
    mean = store.pages.key_mean
    if mean is not None and mean.shape[1] == 1 and not bool(_all_finite(mean, (0, 1, 2, 3))):
        yield "the static key mean is not finite"
    if mean is not None and mean.shape[1] > 1:
        bad |= ~np.asarray(_all_finite(mean, (0, 2, 3)))[:, None]
    for b, pages in enumerate(_pages_of(store, lengths)):
        for g, slot in pages.items():
            tokens = bad[rows[b, slot], : max(0, min(size, int(lengths[b]) - g * size))]
            if tokens.any():
                position = g * size + int(np.flatnonzero(tokens)[0])
                yield f"token {position} of sequence {b} is not finite"


@functools.partial(jax.jit, static_argnums=1)  # so that no array as large as the pool is made
def _all_finite(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.all(jnp.isfinite(x), axis=axes)
