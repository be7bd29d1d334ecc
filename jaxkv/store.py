"""A store: a pool of pages with its tables and allocator, and the protocol of how it is filled."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxkv.allocator import NULL_PAGE, PagePool, allocate, create_pool, release, retain
from jaxkv.page_tables import PageTables, create_tables, enter, entries, look_up
from jaxkv.spans import PageSpan
from pallas_kernels.layouts.page_layout import PageLayout
from pallas_kernels.pages import Pages, empty_pages


class NewTokens(NamedTuple):
    """The tokens of a step in one layer."""

    k: jax.Array  # [batch, tokens, kv_heads, head_dim]
    v: jax.Array  # like k
    lengths: jax.Array  # i32[batch], committed tokens
    pending: jax.Array  # i32[batch], real tokens; later rows are padding


class Committed(NamedTuple):
    """The lengths of sequences before and after a step that is being committed."""

    lengths: jax.Array  # i32[batch], committed tokens before the step
    pending: jax.Array  # i32[batch], tokens that the step prepared
    new_lengths: jax.Array  # i32[batch], committed tokens after the step


class Fill(Protocol):
    """How a store's pages get their content; static and hashable.

    A fill is given all stores of the cache, may read those before its own, and returns its own
    store updated. The store itself reserves, releases and forks pages, by its span alone.
    """

    @property
    def writes_at_commit(self) -> bool:
        """Whether `commit` writes pages; if so, it must do so after all reads of the step."""
        ...

    def attend(
        self, stores: Sequence["Store"], own: int, layer: int | jax.Array, new: NewTokens
    ) -> "Store":
        """Brings one layer of store `own` up to date for the step's queries to read."""
        ...

    def commit(self, stores: Sequence["Store"], own: int, step: Committed) -> "Store":
        """Brings all layers of store `own` up to date for the next step's queries to read."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Static description of a store."""

    span: PageSpan  # which pages of a sequence live here
    fill: Fill
    layout: PageLayout  # how each page is stored
    layers: int  # number of layers that share the tables, each with its own arrays of pages
    kv_heads: int
    width: int  # slots of the ring table
    pages: int  # pages of the pool, the null page included


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """Pages, and which sequences they belong to."""

    pages: Pages
    pool: PagePool
    tables: PageTables
    # i32[], positive; depends on every read of the step, so that commit, which depends on it,
    # writes pages afterwards. Without this dependency XLA might schedule the two at once, and would
    # copy the pool to keep them apart. None where commit writes nothing.
    reads: jax.Array | None
    spec: StoreSpec = dataclasses.field(metadata=dict(static=True))

    @property
    def pages_in_use(self) -> jax.Array:
        """Number of pages in use, `i32[]`; a page that sequences share counts once."""
        return self.spec.pages - 1 - self.pool.free_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, summed over layers: keys, values, factors and the page's mean."""
        pools = (x for x in jax.tree.leaves(self.pages) if x.shape[1] == self.spec.pages)
        # A static key mean belongs to no page, so it is not among the pools.
        return sum(x.size * x.dtype.itemsize // x.shape[1] for x in pools)

    def needed(self, lengths: jax.Array, new_tokens: jax.Array) -> jax.Array:
        """Pages to reserve for `new_tokens` more tokens, `i32[batch]`."""
        span = self.spec.span
        return span.stop_page(lengths + new_tokens) - span.stop_page(lengths)

    def reserve(self, lengths: jax.Array, new_tokens: jax.Array, most: int) -> "Store":
        """Allocates the pages that `needed` counts, at most `most` per sequence."""
        span = self.spec.span
        start, stop = span.stop_page(lengths), span.stop_page(lengths + new_tokens)
        logical, wanted = page_range(start, stop, most)
        pool, page = allocate(self.pool, wanted)
        tables = enter(self.tables, logical, page, wanted)
        return dataclasses.replace(self, pool=pool, tables=tables)

    def settle(self, step: Committed, most: int) -> "Store":
        """Releases reserved pages that were not needed, and pages that no later query reads."""
        span, (lengths, pending, new_lengths) = self.spec.span, step
        reserved = span.stop_page(lengths + pending)
        ranges = [page_range(span.stop_page(new_lengths), reserved, most)]
        if span.releases:
            ranges.append(page_range(span.first_page(lengths), span.first_page(new_lengths), most))
        logical, gone = (jnp.concatenate(x, axis=1) for x in zip(*ranges, strict=True))
        page = jnp.where(gone, look_up(self.tables, logical), NULL_PAGE)
        return dataclasses.replace(
            self,
            pool=release(self.pool, page),
            tables=enter(self.tables, logical, jnp.zeros_like(page), gone),
        )

    def drop(self, mask: jax.Array) -> "Store":
        """Releases all pages of the sequences of `mask`, `bool[batch]`; empties their tables."""
        page = jnp.where(mask[:, None], entries(self.tables), NULL_PAGE)
        tables = jax.tree.map(lambda t: jnp.where(mask[:, None], NULL_PAGE, t), self.tables)
        return dataclasses.replace(self, pool=release(self.pool, page), tables=tables)

    def retain(self, page: jax.Array) -> "Store":
        """Counts one more reference for every entry of `page`."""
        return dataclasses.replace(self, pool=retain(self.pool, page))

    def after_reading(self, out: jax.Array) -> "Store":
        """Makes `reads` depend on `out`, attention over this store."""
        if self.reads is None:
            return self
        one = out[(0,) * out.ndim]
        return dataclasses.replace(self, reads=jnp.where(jnp.isnan(one), 2, self.reads))

    def fork(self, fork: "Fork", copies: jax.Array, starved: jax.Array, target: jax.Array):
        """Gives each target the source's tables, with a fresh copy of the unfinished page.

        Args:
          fork: made from this store; references to the pages to be shared must have been counted.
          copies: `bool[forks]`, whether there is an unfinished page and a free one for its copy.
          starved: `bool[forks]`, which forks end up empty.
          target: `i32[forks]`, the sequence that becomes the copy; out of range for none.
        """
        pool, page = allocate(self.pool, copies)
        tables = enter(fork.source, fork.last, page[:, None], copies[:, None])
        # A starved fork gives back the references that were taken for it.
        held = entries(fork.source)
        kept = jnp.where(starved[:, None] & (held != fork.unfinished), held, NULL_PAGE)
        pool = release(pool, kept)
        written = jnp.where(copies, page, self.spec.pages)

        def copy(pages):
            return pages.at[:, written].set(pages[:, fork.unfinished[:, 0]], mode="drop")

        merged = jax.tree.map(
            lambda old, new: old.at[target].set(new, mode="drop"), self.tables, tables
        )
        return dataclasses.replace(
            self, pages=jax.tree.map(copy, self.pages), pool=pool, tables=merged
        )


class Fork(NamedTuple):
    """The part of a batch of forks that concerns one store."""

    source: PageTables  # tables of the sequences to copy, [forks, ...]
    unfinished: jax.Array  # i32[forks, 1], id of the page to copy, NULL_PAGE where there is none
    last: jax.Array  # i32[forks, 1], logical number of that page
    copies: jax.Array  # bool[forks], whether there is a page to copy


def create_store(spec: StoreSpec, batch: int, static_mean: jax.Array | None = None) -> Store:
    """Allocates an empty store; `static_mean` as in `empty_pages`."""
    pages = empty_pages(
        spec.layout,
        layers=spec.layers,
        pages=spec.pages,
        kv_heads=spec.kv_heads,
        static_mean=static_mean,
    )
    return Store(
        pages=pages,
        pool=create_pool(spec.pages),
        tables=create_tables(batch, width=spec.width, sink_pages=spec.span.sink_pages),
        reads=jnp.int32(1) if spec.fill.writes_at_commit else None,
        spec=spec,
    )


def page_range(start: jax.Array, stop: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """`most` logical pages from `start` on, `i32[batch, most]`, and which are below `stop`."""
    logical = start[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    return logical, logical < stop[:, None]
