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
    """What each sequence's queries see of a segment; arrays, refs of them, or one sequence's."""

    q_start: Operand  # i32[batch], position of the first query
    run: Span  # i32[batch] each, of the run of pages
    sinks: Span | None  # the same of the sink pages' table; None without one

    def of(self, b) -> "Bounds":
        """Those of sequence `b`."""
        return jax.tree.map(lambda ref: ref[b], self)


class SpanPages(NamedTuple):
    """Pages of a span, counted by ordinals that leave out the pages between sinks and window."""

    first: jax.Array  # logical page of ordinal 0
    pages: jax.Array  # ordinals in use; 0 for an empty span
    head: jax.Array | None = None  # ordinals before the gap
    gap: jax.Array | None = None  # pages left out

    def position(self, token: jax.Array, page_size: int) -> jax.Array:
        """Position of the `token`-th token of the ordinals' pages."""
        shift = self.first * page_size
        if self.gap is not None and self.head is not None:
            shift = shift + jnp.where(token >= self.head * page_size, self.gap * page_size, 0)
        return token + shift


def span_pages(bounds: Bounds, rule: Rule, page_size: int) -> SpanPages:
    """Pages that the bounds touch and some query sees; those of a table of sink pages come first.

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
