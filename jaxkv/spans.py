"""Which pages of a sequence live in a store, as a function of the sequence's length alone.

Logical page `g` holds entries from `g * page_size` on. At a given length, a store holds the pages
`first_page <= g < stop_page`, and sink pages. Preparing a step reserves pages for the length that
the step may reach; committing it releases pages outside the span of the length that it did reach.
Lengths may be NumPy arrays, too: then the host computes.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from pallas_kernels.rule import Rule
from pallas_kernels.shapes import cdiv, larger, smaller

Lengths = jax.Array | np.ndarray  # integers; results are of the same kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageSpan:
    """The span of one store: pinned sink pages, and a run of pages behind them."""

    page_size: int  # entries per page
    rule: Rule  # which keys of this store a query reads
    first: int  # first logical page of the run: the layer's sink pages come before it
    sink_pages: int  # number of first pages that this store keeps until the sequence is freed
    complete: bool = False  # whether pages enter only complete, once they lie behind the lag

    @property
    def sinks_only(self) -> bool:
        """Whether the run is empty: its lag serves no page."""
        lag = self.rule.lag
        return lag is not None and lag.most is not None and lag.most <= lag.least

    @property
    def releases(self) -> bool:
        """Whether pages fall behind as a sequence grows."""
        return self.rule.most_pages(1, self.page_size) is not None

    def first_page(self, lengths: Lengths) -> Any:
        """Oldest page of the run that a query at position `lengths` or later reads here."""
        first = self.first + 0 * lengths
        seen = self.rule.first_page(lengths, self.page_size)
        return first if seen is None else larger(first, seen)

    def stop_page(self, lengths: Lengths) -> Any:
        """One past the newest page of this store once `lengths` tokens are committed."""
        if self.complete:
            lag = self.rule.lag
            stop = lengths // self.page_size if lag is None else lag.stop_page(lengths)
            return larger(stop, self.first)
        begun = cdiv(lengths, self.page_size)
        if self.sinks_only:
            return smaller(begun, self.sink_pages)
        return begun if self.sink_pages else larger(begun, self.first)

    def takes_tokens(self, logical: jax.Array) -> jax.Array:
        """Whether new tokens of page `logical` are written to this store, `bool[...]`."""
        sinks = logical < self.sink_pages
        if self.complete or self.sinks_only:
            return sinks
        return sinks | (logical >= self.first)

    def width(self, max_new_tokens: int, max_tokens: int | None) -> int:
        """Number of slots that the ring table needs, so that no live page loses its slot.

        Args:
          max_new_tokens: most tokens that a step adds to a sequence.
          max_tokens: most tokens of a sequence; None for no limit.
        """
        # Complete pages enter when the step commits, so the next query counts, too.
        queries = max_new_tokens + 1 if self.complete else max_new_tokens
        most = self.rule.most_pages(queries, self.page_size)
        widths = [] if most is None else [most]
        if max_tokens is not None:
            stop = cdiv(max_tokens, self.page_size)
            if self.complete and self.rule.lag is not None:
                stop = self.rule.lag.stop_page(max_tokens)
            widths.append(stop - self.first)
        return max(min(widths), 1)
