"""Attention of new tokens over a layer's segments, one or more per store, merged by their lse."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxkv.spec import LayerSpec
from jaxkv.store import Store
from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Queries, Segment, add_learned_sink, merge


def attend_stores(
    queries: Queries,
    stores: Sequence[Store],
    spec: LayerSpec,
    *,
    layer: int | jax.Array,
    scale: float,
    soft_cap: float | None,
    sink_logits: jax.Array | None,
    q_sink: jax.Array | None,
    backend: Backend | None,
) -> jax.Array:
    """Attends the queries to everything that their layer has kept.

    Args:
      queries: the new tokens; their keys must have been written.
      stores: the stores of the layer's group.
      spec: the layer's spec.
      layer: the layer's index in its group.
      scale: as in `KVCache.attend`, like the arguments after it.

    Returns:
      Outputs shaped like `queries.q`, of its dtype if nothing had to be merged, else float32.
    """
    reads = [read for store in stores for read in _segments(queries, store, spec, q_sink)]
    single = len(reads) == 1 and sink_logits is None
    parts = (
        paged_attention(
            *read,
            layer=layer,
            scale=scale,
            soft_cap=soft_cap,
            out_dtype=queries.q.dtype if single else jnp.float32,
            backend=backend,
        )
        for read in reads
    )
    part = functools.reduce(merge, parts)
    return part.out if sink_logits is None else add_learned_sink(part, sink_logits).out


def _segments(
    queries: Queries, store: Store, spec: LayerSpec, q_sink: jax.Array | None
) -> Iterator[tuple[Queries, Pages, Segment, Rule]]:
    """The segments of a store, each with the queries that read it and their rule."""
    span, tables, pages = store.spec.span, store.tables, store.pages
    stop = queries.start + queries.lens
    start = span.first_page(queries.start) * span.page_size
    if tables.sinks is None:
        yield queries, pages, Segment(tables.ring, start, stop), span.rule
        return
    if q_sink is None:
        yield queries, pages, Segment(tables.ring, start, stop, tables.sinks), span.rule
        return
    # Only the sink tokens are read by the re-rotated query; other tokens in their last page are
    # ordinary tokens of the window.
    run_rule = dataclasses.replace(span.rule, sink_tokens=0)
    yield queries, pages, Segment(tables.ring, start, stop), run_rule
    border = jnp.minimum(stop, spec.sink_tokens)
    sinks = Segment(tables.sinks, jnp.zeros_like(border), border)
    sink_rule = Rule(window=spec.window, sink_tokens=spec.sink_tokens)
    yield dataclasses.replace(queries, q=q_sink), pages, sinks, sink_rule
    pinned = span.sink_pages * span.page_size
    if spec.sink_tokens < pinned:
        others = Segment(tables.sinks, border, jnp.minimum(stop, pinned))
        yield queries, pages, others, Rule(window=spec.window)
