"""Attention of new tokens over a sequence's segments: the body, the recent pages, the sinks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxkv.config import LayerGroup
from jaxkv.store import GroupState, Store
from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Queries, Segment, add_learned_sink, merge


def attend_stores(
    q: jax.Array,
    state: GroupState,
    *,
    group: LayerGroup,
    layer: int | jax.Array,
    lengths: jax.Array,
    pending: jax.Array,
    scale: float,
    soft_cap: float | None,
    sink_logits: jax.Array | None,
    q_sink: jax.Array | None,
    backend: Backend | None,
) -> jax.Array:
    """Attends `q` to everything its layer has kept; arguments as in `KVCache.attend`.

    Returns:
      Shaped like `q`; of its dtype where there is nothing to merge, else float32.
    """
    stop = lengths + pending
    single = len(state.stores) == 1 and q_sink is None and sink_logits is None

    def attend(q, store: Store, segment: Segment, rule: Rule):
        return paged_attention(
            Queries(q, lengths, pending),
            store.pages,
            segment,
            rule,
            layer=layer,
            scale=scale,
            soft_cap=soft_cap,
            out_dtype=q.dtype if single else jnp.float32,
            backend=backend,
        )

    parts = []
    for store in state.stores:
        spec, tables = store.spec, store.tables
        start = spec.first_page(lengths) * spec.page_size
        sinks = tables.sinks if spec.sink_pages else None
        if sinks is None or q_sink is None:
            parts.append(attend(q, store, Segment(tables.ring, start, stop, sinks), spec.rule))
            continue
        # The sink tokens, and only they, see the re-rotated query; others that share their last
        # page are ordinary tokens of the window.
        sink_tokens, window = group.spec.sink_tokens, Rule(window=group.spec.window)
        ring_rule = dataclasses.replace(spec.rule, sink_tokens=0)
        parts.append(attend(q, store, Segment(tables.ring, start, stop), ring_rule))
        zero, border = jnp.zeros_like(stop), jnp.minimum(stop, sink_tokens)
        end = jnp.minimum(stop, spec.sink_pages * spec.page_size)
        sink_rule = dataclasses.replace(window, sink_tokens=sink_tokens)
        parts.append(attend(q_sink, store, Segment(sinks, zero, border), sink_rule))
        if sink_tokens < spec.sink_pages * spec.page_size:
            parts.append(attend(q, store, Segment(sinks, border, end), window))
    part = functools.reduce(merge, parts)
    return part.out if sink_logits is None else add_learned_sink(part, sink_logits).out
