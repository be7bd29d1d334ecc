"""The tokens of an item, a block at a time: where they stand, and which of them count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.paged_attention.gpu_case import Case, table_slot
from pallas_kernels.paged_attention.gpu_dequant import Where
from pallas_kernels.paged_attention.gpu_split import SpanPages


@dataclasses.dataclass(frozen=True)
class Item:
    """What a program does at a time: ordinal pages `start <= o < stop` of sequence `b`'s span."""

    b: jax.Array
    start: jax.Array
    stop: jax.Array
    span: SpanPages
    part: jax.Array | None  # of the sequence's; None where it is never cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """An item's blocks. Tokens are counted from the item's first page, `length` lie in the span."""

    refs: dict[str, Any]
    case: Case
    size: int  # tokens of a block
    head: Any
    layer: Any
    b: jax.Array
    span: SpanPages
    kv_span: tuple[jax.Array, jax.Array]  # positions that some query sees
    sink_span: tuple[jax.Array, jax.Array] | None  # the same of the sink pages' table
    base: jax.Array  # the item's first token among those of the span's pages
    first: jax.Array  # its position
    length: jax.Array

    @property
    def count(self) -> jax.Array:
        """Blocks with a token in the span."""
        return pl.cdiv(jnp.maximum(self.length, 0), self.size)

    def look_up(self, i):
        """What the table holds for a block: one page, or one for every token."""
        _, slot = self._find(i)
        return self.refs["table"][self.b, slot]

    def locate(self, i, page, *, masked: bool):
        """Where block `i`'s tokens are, their positions, and which lie in the span.

        `page` is what `look_up` found.
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
                page = jnp.where(inside, page, 0)  # past its end the table may hold anything
        mask = inside if masked else None
        where = Where(self.layer, self.head, page, slot, self.size, place, mask)
        return where, positions, inside

    def _find(self, i):
        """Position of a block's first token and its page's slot of the table; or of every token.

        Past the item's end, too, the slot is one of the table's.
        """
        token = self.base + i * self.size
        if self.case.page_size < self.size:
            token = token + jnp.arange(self.size, dtype=jnp.int32)
        position = self.span.position(token, self.case.page_size)
        return position, table_slot(position // self.case.page_size, self.refs, self.case)

    def _in_span(self, positions):
        start, stop = self.kv_span
        if self.sink_span is not None:
            sink_start, sink_stop = self.sink_span
            is_sink = positions < self.case.sink_pages * self.case.page_size
            start = jnp.where(is_sink, sink_start, start)
            stop = jnp.where(is_sink, sink_stop, stop)
        return (positions >= start) & (positions < stop)


def blocks_of(item: Item, refs, case: Case, *, size: int, head, layer, kv_span) -> Blocks:
    """The blocks of `size` tokens of an item of one kv head."""
    b, span = item.b, item.span
    base = item.start * case.page_size
    first = span.position(base, case.page_size)
    stop = _ordinal(kv_span[1], span, case)
    sink_span = None
    if case.sink_pages:
        assert span.head is not None
        sink_span = refs["sink_start"][b], refs["sink_stop"][b]
        stop = jnp.where(span.pages > span.head, stop, sink_span[1])
    return Blocks(
        refs=refs,
        case=case,
        size=size,
        head=head,
        layer=layer,
        b=b,
        span=span,
        kv_span=kv_span,
        sink_span=sink_span,
        base=base,
        first=first,
        length=jnp.minimum((item.stop - item.start) * case.page_size, stop - base),
    )


def _ordinal(kv_stop, span: SpanPages, case: Case):
    """How many tokens of the ordinals' pages lie before `kv_stop`."""
    stop = kv_stop - span.first * case.page_size
    return stop if span.gap is None else stop - span.gap * case.page_size
