"""The pages that a sequence's queries see, numbered in order without the gap behind the sinks."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.rule import Rule
from pallas_kernels.segment import Span
from pallas_kernels.shapes import Operand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """The entries of a segment that each sequence's queries see: arrays, or refs in a kernel."""

    q_start: Operand  # i32[batch], position of the first query
    run: Span  # i32[batch] each, in the run of pages
    sinks: Span | None  # i32[batch] each, in the pinned sink pages; None without them

    def of(self, b) -> "Bounds":
        """The bounds of sequence `b`, each `i32[]`."""
        return jax.tree.map(lambda ref: ref[b], self)


class SpanPages(NamedTuple):
    """Pages of a span, numbered by ordinals that skip the gap between sinks and window."""

    first: jax.Array  # logical page of ordinal 0
    pages: jax.Array  # number of ordinals; 0 for an empty span
    head: jax.Array | None = None  # number of ordinals before the gap; None if there is no gap
    gap: jax.Array | None = None  # number of pages in the gap

    def position(self, token: jax.Array, page_size: int) -> jax.Array:
        """Position of the `token`-th token of the span's pages."""
        shift = self.first * page_size
        if self.gap is not None and self.head is not None:
            shift = shift + jnp.where(token >= self.head * page_size, self.gap * page_size, 0)
        return token + shift


def span_pages(bounds: Bounds, rule: Rule, page_size: int) -> SpanPages:
    """Pages with an entry within the bounds, without the gap behind sinks; sink pages come first.

    `bounds` may hold integers of any shape.
    """
    start, stop = bounds.run
    first = start // page_size
    pages = jnp.where(stop > start, pl.cdiv(stop, page_size) - first, 0)
    if bounds.sinks is not None:
        sink_start, sink_stop = bounds.sinks
        head = jnp.where(sink_stop > sink_start, pl.cdiv(sink_stop, page_size), 0)
        return SpanPages(jnp.zeros_like(first), head + pages, head, first - head)
    if rule.window is None or not rule.sink_tokens:
        return SpanPages(first, pages)
    sink_pages = pl.cdiv(rule.sink_tokens, page_size)
    head = jnp.minimum(jnp.maximum(sink_pages - first, 0), pages)
    near = jnp.maximum(rule.window_start(bounds.q_start), start) // page_size
    gap = jnp.minimum(jnp.maximum(near - first - head, 0), pages - head)
    return SpanPages(first, pages - gap, head, gap)
