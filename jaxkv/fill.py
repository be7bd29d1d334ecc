"""The two fills: tokens written as they come, and pages quantized from another store."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxkv.page_tables import look_up
from jaxkv.store import Committed, NewTokens, Store, page_range
from pallas_kernels.quantize_pages import quantize_pages
from pallas_kernels.shapes import cdiv
from pallas_kernels.write_pages import write_pages


@dataclasses.dataclass(frozen=True)
class TokenFill:
    """New tokens are written as they come; the layout decides whether exactly or as codes."""

    writes_at_commit = False

    def attend(
        self, stores: Sequence[Store], own: int, layer: int | jax.Array, new: NewTokens
    ) -> Store:
        """Writes the new tokens that belong in this store at their positions."""
        store, span = stores[own], stores[own].spec.span
        row = jnp.arange(new.k.shape[1], dtype=jnp.int32)[None]
        position = new.lengths[:, None] + row
        logical = position // span.page_size
        pages = write_pages(
            store.pages,
            new.k,
            new.v,
            layer=layer,
            page=look_up(store.tables, logical),
            slot=position % span.page_size,
            writes=(row < new.pending[:, None]) & span.takes_tokens(logical),
        )
        return dataclasses.replace(store, pages=pages)

    def commit(self, stores: Sequence[Store], own: int, step: Committed) -> Store:
        """Returns the store unchanged: its tokens have been written."""
        del step
        return stores[own]


@dataclasses.dataclass(frozen=True)
class PageFill:
    """Complete pages of another store are quantized when they leave its recent span.

    Attributes:
      source: number of that store in the cache, below this store's own.
    """

    source: int

    writes_at_commit = True

    def attend(
        self, stores: Sequence[Store], own: int, layer: int | jax.Array, new: NewTokens
    ) -> Store:
        """Quantizes, in one layer, pages that a query of this step reads as codes.

        They are complete in this step, so their codes are final if its tokens are accepted. Pages
        of rejected tokens are quantized again when accepted tokens complete them.
        """
        span = stores[own].spec.span
        most = cdiv(new.k.shape[1] - 1, span.page_size)
        if most == 0:
            return stores[own]
        newest = span.stop_page(new.lengths + new.pending - 1)
        stop = jnp.where(new.pending > 0, newest, 0)
        logical, wanted = page_range(span.stop_page(new.lengths), stop, most)
        return self._quantize(stores, own, layer, logical, wanted)

    def commit(self, stores: Sequence[Store], own: int, step: Committed) -> Store:
        """Quantizes, in all layers, the page that only queries of the next step read as codes."""
        store, span = stores[own], stores[own].spec.span
        assert store.reads is not None and span.rule.lag is not None
        newest = (step.lengths + step.pending - 1) // span.page_size  # page of the last query
        page = step.new_lengths // span.page_size
        leaves = (step.new_lengths > step.lengths) & (page > newest) & (store.reads > 0)
        logical = (page - span.rule.lag.least)[:, None]
        return self._quantize(stores, own, None, logical, leaves[:, None] & (logical >= span.first))

    def _quantize(
        self, stores: Sequence[Store], own: int, layer, logical: jax.Array, wanted: jax.Array
    ) -> Store:
        source, store = stores[self.source], stores[own]
        pages = quantize_pages(
            store.pages,
            source.pages,
            layer=layer,
            source=look_up(source.tables, logical).reshape(-1),
            target=look_up(store.tables, logical).reshape(-1),
            wanted=wanted.reshape(-1),
        )
        return dataclasses.replace(store, pages=pages)
