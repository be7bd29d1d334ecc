"""The tokens of an item, block by block: where they are, and which of them some query sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.paged_attention.triton.address import Address
from pallas_kernels.paged_attention.triton.case import Case
from pallas_kernels.paged_attention.triton.operands import Inputs
from pallas_kernels.paged_attention.triton.span import SpanPages
from pallas_kernels.segment import Span


@dataclasses.dataclass(frozen=True)
class Item:
    """One piece of a program's work: pages `start <= ordinal < stop` of sequence `b`'s span."""

    b: jax.Array  # i32[]
    start: jax.Array  # i32[]
    stop: jax.Array  # i32[]
    span: SpanPages
    part: jax.Array | None  # number of the part that it yields; None where sequences are never cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """An item's blocks: tokens are counted from the beginning of the item's first page."""

    refs: Inputs
    case: Case
    size: int  # tokens per block
    head: Any  # i32[], kv head
    layer: Any  # i32[]
    b: jax.Array  # i32[], sequence
    span: SpanPages
    q_start: Any  # i32[], position of the first query
    seen: Span  # positions of the run that some query sees
    sinks: Span | None  # positions in pinned sink pages that some query sees
    base: jax.Array  # i32[], number of the item's first token among the tokens of the span's pages
    first: jax.Array  # i32[], position of the item's first token
    length: jax.Array  # i32[], the item's tokens up to the end of the span

    @property
    def count(self) -> jax.Array:
        """Number of blocks with a token in the span."""
        return pl.cdiv(jnp.maximum(self.length, 0), self.size)

    def look_up(self, i):
        """Page id of block `i`, or of each of its tokens if a block is larger than a page."""
        _, slot = self._find(i)
        return self.refs.table[self.b, slot]

    def locate(self, i, page, *, masked: bool):
        """The address of block `i`'s tokens, their positions, and which lie in the span.

        `page` comes from `look_up`.
        """
        page_size = self.case.page_size
        position, place = self._find(i)
        if page_size >= self.size:
            slot = pl.ds(pl.multiple_of(position % page_size, self.size), self.size)
            positions = position + jnp.arange(self.size, dtype=jnp.int32)
            inside = self._in_span(positions)
        else:
            slot, positions, inside = position % page_size, position, self._in_span(position)
            if masked:
                tokens = i * self.size + jnp.arange(self.size, dtype=jnp.int32)
                inside = inside & (tokens < self.length)
                page = jnp.where(inside, page, 0)  # past the span the table may hold anything
        mask = inside if masked else None
        address = Address(self.layer, self.head, page, slot, self.size, place, mask)
        return address, positions, inside

    def _find(self, i):
        """Position of block `i`'s first token, and the slot of its page in the table.

        Returns both for every token if a block is larger than a page. The slot is a valid one past
        the item's end, too.
        """
        token = self.base + i * self.size
        if self.case.page_size < self.size:
            token = token + jnp.arange(self.size, dtype=jnp.int32)
        position = self.span.position(token, self.case.page_size)
        return position, self.case.table_slot(position // self.case.page_size, self.refs.table)

    def _in_span(self, positions):
        start, stop = self.seen
        if self.sinks is not None:
            sink_start, sink_stop = self.sinks
            is_sink = positions < self.case.sink_pages * self.case.page_size
            start = jnp.where(is_sink, sink_start, start)
            stop = jnp.where(is_sink, sink_stop, stop)
        inside = (positions >= start) & (positions < stop)
        if self.case.q_tokens == 1 and self.case.rule.needs_mask(1):
            # All rows are one query's, which does not see what lies between sinks and its window.
            # Not loaded, rather than masked: it may be NaN, and 0 * NaN is NaN.
            inside = inside & self.case.rows_see(self.q_start, positions)
        return inside


def blocks_of(
    item: Item, refs: Inputs, case: Case, *, size: int, head, layer, q_start, seen: Span
) -> Blocks:
    """Cuts an item into blocks of `size` tokens, for one kv head."""
    b, span = item.b, item.span
    base = item.start * case.page_size
    first = span.position(base, case.page_size)
    stop = _ordinal(seen.stop, span, case)
    sinks = None
    if case.sink_pages:
        assert span.head is not None and refs.bounds.sinks is not None
        sinks = Span(*(ref[b] for ref in refs.bounds.sinks))
        stop = jnp.where(span.pages > span.head, stop, sinks.stop)
    return Blocks(
        refs=refs,
        case=case,
        size=size,
        head=head,
        layer=layer,
        b=b,
        span=span,
        q_start=q_start,
        seen=seen,
        sinks=sinks,
        base=base,
        first=first,
        length=jnp.minimum((item.stop - item.start) * case.page_size, stop - base),
    )


def _ordinal(kv_stop, span: SpanPages, case: Case):
    """Number of tokens of the span's pages that lie before position `kv_stop`."""
    stop = kv_stop - span.first * case.page_size
    return stop if span.gap is None else stop - span.gap * case.page_size
