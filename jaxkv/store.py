"""One pool of pages with its tables and its allocator, and the stores of a layer group.

What a store does in a step follows from two numbers of `StoreSpec`, `first_page` and `stop_page`
of a length: pages between them are alive. Preparing a step reserves up to the stop of the length
it may reach; committing releases what lies outside the span of the length it did reach.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxkv.allocator import NULL_PAGE, PagePool, allocate, create_pool, release, retain
from jaxkv.config import LayerGroup, StoreSpec
from jaxkv.page_tables import PageTables, create_tables, enter, entries, look_up
from pallas_kernels.codecs.presets import exact_codec
from pallas_kernels.layouts.plain import Plain
from pallas_kernels.pages import Pages, empty_pages
from pallas_kernels.quantize_pages import quantize_pages
from pallas_kernels.write_pages import write_pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """Pages, and who they belong to."""

    pages: Pages
    pool: PagePool
    tables: PageTables
    spec: StoreSpec = dataclasses.field(metadata=dict(static=True))

    @property
    def pages_in_use(self) -> jax.Array:
        """Pages that hold something, `i32[]`; a shared page counts once."""
        return self.spec.pages - 1 - self.pool.free_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys, values, factors and means."""
        pools = (x for x in jax.tree.leaves(self.pages) if x.shape[1] == self.spec.pages)
        return sum(
            x.size * x.dtype.itemsize // x.shape[1] for x in pools
        )  # a static key mean is no page's

    def needed(self, lengths: jax.Array, new_tokens: jax.Array) -> jax.Array:
        """Pages that `new_tokens` more tokens need at most, `i32[batch]`."""
        return self.spec.stop_page(lengths + new_tokens) - self.spec.stop_page(lengths)

    def reserve(self, lengths: jax.Array, new_tokens: jax.Array, most: int) -> "Store":
        """Allocates what `needed` counts, at most `most` pages a sequence."""
        start, stop = self.spec.stop_page(lengths), self.spec.stop_page(lengths + new_tokens)
        logical, wanted = _span(start, stop, most)
        pool, page = allocate(self.pool, wanted)
        tables = enter(self.tables, logical, page, wanted)
        return dataclasses.replace(self, pool=pool, tables=tables)

    def settle(
        self, lengths: jax.Array, pending: jax.Array, new_lengths: jax.Array, most: int
    ) -> "Store":
        """Releases reserved pages that were not needed, and pages that fell behind."""
        spec = self.spec
        spans = [_span(spec.stop_page(new_lengths), spec.stop_page(lengths + pending), most)]
        if spec.releases:
            spans.append(_span(spec.first_page(lengths), spec.first_page(new_lengths), most))
        logical, gone = (jnp.concatenate(x, axis=1) for x in zip(*spans, strict=True))
        page = jnp.where(gone, look_up(self.tables, logical), NULL_PAGE)
        return dataclasses.replace(
            self,
            pool=release(self.pool, page),
            tables=enter(self.tables, logical, jnp.zeros_like(page), gone),
        )

    def drop(self, mask: jax.Array) -> "Store":
        """Releases everything that the sequences of `mask`, `bool[batch]`, reference."""
        page = jnp.where(mask[:, None], entries(self.tables), NULL_PAGE)
        tables = jax.tree.map(lambda t: jnp.where(mask[:, None], NULL_PAGE, t), self.tables)
        return dataclasses.replace(self, pool=release(self.pool, page), tables=tables)

    def retain(self, page: jax.Array) -> "Store":
        """Counts one more reference for every entry of `page`."""
        return dataclasses.replace(self, pool=retain(self.pool, page))

    def write(
        self,
        layer: int | jax.Array,
        k: jax.Array,
        v: jax.Array,
        position: jax.Array,
        writes: jax.Array,
    ) -> "Store":
        """Stores the tokens that belong here, `[batch, tokens, ...]`, at their positions."""
        size = self.spec.page_size
        logical = position // size
        pages = write_pages(
            self.pages,
            k,
            v,
            layer=layer,
            page=look_up(self.tables, logical),
            slot=position % size,
            writes=writes & self.spec.is_written(logical),
        )
        return dataclasses.replace(self, pages=pages)

    def fork(
        self,
        source: PageTables,
        unfinished: jax.Array,
        copies: jax.Array,
        starved: jax.Array,
        last: jax.Array,
        target: jax.Array,
    ) -> "Store":
        """Gives each target the source's tables, with a fresh copy of the unfinished page.

        Args:
          source: tables of the sources, `[forks, ...]`; references to what will be shared have
            been counted.
          unfinished: `i32[forks, 1]`, the page to copy, null where there is none.
          copies: `bool[forks]`, where there is one and a page for the copy.
          starved: `bool[forks]`, forks that end up empty.
          last: `i32[forks, 1]`, logical number of the unfinished page.
          target: `i32[forks]`, out of range where nothing happens.
        """
        pool, page = allocate(self.pool, copies)
        tables = enter(source, last, page[:, None], copies[:, None])
        # A starved fork gives back the references that were taken for it.
        held = entries(source)
        kept = jnp.where(starved[:, None] & (held != unfinished), held, NULL_PAGE)
        pool = release(pool, kept)
        written = jnp.where(copies, page, self.spec.pages)

        def copy(pages):
            return pages.at[:, written].set(pages[:, unfinished[:, 0]], mode="drop")

        merged = jax.tree.map(
            lambda old, new: old.at[target].set(new, mode="drop"), self.tables, tables
        )
        return dataclasses.replace(
            self, pages=jax.tree.map(copy, self.pages), pool=pool, tables=merged
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupState:
    """The stores of the layers that keep the same things."""

    exact: Store | None  # values as they are: everything, or the newest and the sink pages
    body: Store | None  # codes: the other pages, with a lossy codec
    # What every read of the step has come to, so that commit writes codes only after them: without
    # a dependency XLA may schedule the two at once, and copies the pool to keep them apart.
    reads: jax.Array | None  # i32[], positive; None where commit writes no codes

    @property
    def stores(self) -> tuple[Store, ...]:
        """Those there are."""
        return tuple(store for store in (self.exact, self.body) if store is not None)

    def map(self, change) -> "GroupState":
        """Applies `change(store)` to each store."""
        apply = lambda store: None if store is None else change(store)
        return dataclasses.replace(self, exact=apply(self.exact), body=apply(self.body))

    def after_reading(self, out: jax.Array) -> "GroupState":
        """Notes that `out`, attention over these stores, has been computed."""
        if self.reads is None:
            return self
        one = out[(0,) * out.ndim]
        return dataclasses.replace(self, reads=jnp.where(jnp.isnan(one), 2, self.reads))

    def quantize_for_chunk(
        self, layer: int | jax.Array, lengths: jax.Array, pending: jax.Array, tokens: int
    ) -> "GroupState":
        """Quantizes, in one layer, pages that a query of this very step reads as codes.

        They are complete in the step, so their codes are final if it is accepted; what is rejected
        is quantized again when it is really complete.
        """
        most = -(-(tokens - 1) // self._page_size)
        if self.reads is None or most == 0:
            return self
        lag = self._body.spec.lag
        newest = (lengths + pending - 1) // self._body.spec.page_size - lag.least
        start = self._body.spec.stop_page(lengths)
        stop = jnp.where(pending > 0, newest + 1, 0)
        return self._quantize(layer, *_span(start, stop, most))

    def quantize_for_commit(
        self, lengths: jax.Array, pending: jax.Array, new_lengths: jax.Array
    ) -> "GroupState":
        """Quantizes, in all layers, the page that only queries of the next step read as codes."""
        if self.reads is None:
            return self
        lag = self._body.spec.lag
        newest = (
            lengths + pending - 1
        ) // self._body.spec.page_size  # page of the step's last query
        page = new_lengths // self._body.spec.page_size
        leaves = (new_lengths > lengths) & (page > newest) & (self.reads > 0)
        logical = (page - lag.least)[:, None]
        return self._quantize(None, logical, leaves[:, None] & (logical >= self._body.spec.first))

    def _quantize(self, layer, logical: jax.Array, wanted: jax.Array) -> "GroupState":
        exact, body = self.exact, self._body
        assert exact is not None
        pages = quantize_pages(
            body.pages,
            exact.pages,
            layer=layer,
            source=look_up(exact.tables, logical).reshape(-1),
            target=look_up(body.tables, logical).reshape(-1),
            wanted=wanted.reshape(-1),
        )
        return dataclasses.replace(self, body=dataclasses.replace(body, pages=pages))

    @property
    def _body(self) -> Store:
        assert self.body is not None
        return self.body

    @property
    def _page_size(self) -> int:
        return self.stores[0].spec.page_size


def create_group(
    group: LayerGroup, batch: int, key_means: Sequence[jax.Array] | None = None
) -> GroupState:
    """Allocates empty stores for a layer group; `key_means` as in `KVCache.create`."""
    spec, exact, body = group.spec, None, None
    empty = functools.partial(empty_pages, layers=len(group.layers), kv_heads=spec.kv_heads)
    if group.exact is not None:
        layout = Plain(
            codec=exact_codec(spec.dtype), head_dim=spec.head_dim, page_size=group.exact.page_size
        )
        pages = empty(layout, pages=group.exact.pages)
        exact = _create_store(pages, group.exact, batch)
    if group.body is not None and group.layout is not None:
        mean = None
        if spec.kv_codec.key_mean == "static":
            mean = _static_mean(group, key_means)
        pages = empty(group.layout, pages=group.body.pages, static_mean=mean)
        body = _create_store(pages, group.body, batch)
    quantizes = body is not None and body.spec.lag.least > 0
    return GroupState(exact=exact, body=body, reads=jnp.int32(1) if quantizes else None)


def _static_mean(group: LayerGroup, key_means: Sequence[jax.Array] | None) -> jax.Array:
    """`f16[layers, 1, kv_heads, head_dim]`, in the space of the codes."""
    shape, codec = (group.spec.kv_heads, group.spec.head_dim), group.spec.kv_codec
    if key_means is None:
        raise ValueError(
            f"codec {codec.name!r} removes a static key mean, and key_means=None: fit them with "
            "jaxkv.fit_key_means (scripts/fit_key_means.py), or use key_mean='page' or None."
        )
    own = [jnp.asarray(key_means[layer]) for layer in group.layers]
    for layer, mean in zip(group.layers, own, strict=True):
        if mean.shape != shape:
            raise ValueError(f"key_means[{layer}].shape={mean.shape} must be {shape}.")
    return codec.stored_mean(jnp.stack(own))[:, None]


def _create_store(pages: Pages, spec: StoreSpec, batch: int) -> Store:
    return Store(
        pages=pages, pool=create_pool(spec.pages), tables=create_tables(spec, batch), spec=spec
    )


def _span(start: jax.Array, stop: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Logical pages `start .. stop` of each sequence, `i32[batch, most]`, and which of them are."""
    logical = start[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    return logical, logical < stop[:, None]
