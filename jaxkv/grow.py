"""Moves a cache's sequences into a larger cache, between calls of generation."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.allocator import PagePool
from jaxkv.cache import KVCache
from jaxkv.config import CacheConfig
from jaxkv.page_tables import PageTables, create_tables, enter, look_up
from jaxkv.store import Store, StoreSpec


def grow(cache: KVCache, config: CacheConfig) -> KVCache:
    """The same sequences in a cache of `config`, which has longer tables or larger pools.

    Every array is copied once. Call it only between steps.

    Args:
      cache: what to move; it is not donated.
      config: like the cache's, with at least its `max_tokens` and `pages`.

    Raises:
      ValueError: the configurations differ in anything else, or the new one is smaller.
    """
    old = cache.config
    same = dataclasses.replace(config, max_tokens=old.max_tokens, pages=old.pages)
    if same != old:
        raise ValueError(f"a cache can't grow from {old} to {config}: only in tokens and pages.")
    pairs = list(zip(cache.stores, config.stores, strict=True))
    if any(new.pages < store.spec.pages or new.width < store.spec.width for store, new in pairs):
        raise ValueError(f"a cache can't shrink from {old} to {config}.")
    stores = tuple(_grow_store(store, new, cache.lengths) for store, new in pairs)
    return dataclasses.replace(cache, stores=stores, config=config)


def _grow_store(store: Store, new: StoreSpec, lengths: jax.Array) -> Store:
    more = new.pages - store.spec.pages
    pad = lambda x: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
    # A static key mean belongs to no page.
    pools = lambda x: pad(x) if x.shape[1] == store.spec.pages else x
    return dataclasses.replace(
        store,
        pages=jax.tree.map(pools, store.pages),
        pool=_grow_pool(store.pool, more),
        tables=_move_tables(store, new, lengths),
        spec=new,
    )


def _grow_pool(pool: PagePool, more: int) -> PagePool:
    """Puts the new pages below the free ones of the stack, the lowest on top."""
    pages = pool.references.size
    ids = jnp.arange(pages + more - 1, pages - 1, -1, dtype=jnp.int32)
    return PagePool(
        free_stack=jnp.concatenate([ids, pool.free_stack]),
        free_pages=pool.free_pages + more,
        references=jnp.pad(pool.references, (0, more)),
    )


def _move_tables(store: Store, new: StoreSpec, lengths: jax.Array) -> PageTables:
    """The ids of live pages in the slots that they have in a wider ring."""
    old, span = store.tables, new.span
    batch, width = old.ring.shape
    tables = create_tables(batch, width=new.width, sink_pages=span.sink_pages)
    # A ring of `width` slots holds the last `width` pages; sink pages have a table of their own.
    logical = span.stop_page(lengths)[:, None] - 1 - jnp.arange(width, dtype=jnp.int32)[None]
    live = (logical >= span.first_page(lengths)[:, None]) & (logical >= span.sink_pages)
    tables = enter(tables, logical, look_up(old, logical), live)
    pinned = jnp.broadcast_to(
        jnp.arange(store.spec.span.sink_pages, dtype=jnp.int32)[None],
        (batch, store.spec.span.sink_pages),
    )
    if pinned.shape[1] == 0:
        return tables
    held = look_up(old, pinned)
    return enter(tables, pinned, held, jnp.ones_like(pinned, bool))
