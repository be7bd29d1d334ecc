"""Attention of new tokens over a sequence's segments: sinks beside the ring of the other pages."""

import jax
import jax.numpy as jnp

from jaxkv.config import LayerGroup
from jaxkv.page_tables import PageTables, first_ring_page
from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.segments import add_learned_sink, merge


def attend_segments(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: PageTables,
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
      `f32` shaped like `q`.
    """
    page_size = k_pages.shape[3]
    window, sink_tokens = group.spec.window, group.spec.stored_sink_tokens
    stop = lengths + pending
    sink_stop = jnp.minimum(stop, group.sink_pages * page_size)

    def segment(q, table, kv_start, kv_stop, sink_tokens=0):
        return paged_attention(
            q,
            k_pages,
            v_pages,
            table,
            layer=layer,
            q_start=lengths,
            q_lens=pending,
            kv_start=kv_start,
            kv_stop=kv_stop,
            scale=scale,
            window=window,
            sink_tokens=sink_tokens,
            soft_cap=soft_cap,
            backend=backend,
        )

    ring_start = first_ring_page(group, lengths, page_size) * page_size
    out, lse = segment(q, tables.ring, ring_start, stop)
    if group.sink_pages:
        zero = jnp.zeros_like(stop)
        if q_sink is None:
            sinks = segment(q, tables.sinks, zero, sink_stop, sink_tokens)
            out, lse = merge(out, lse, *sinks)
        else:
            # Only the sink tokens see the re-rotated query; others that share their last page
            # are ordinary tokens of the window.
            border = jnp.minimum(stop, sink_tokens)
            sinks = segment(q_sink, tables.sinks, zero, border, sink_tokens)
            out, lse = merge(out, lse, *sinks)
            if sink_tokens % page_size:
                out, lse = merge(out, lse, *segment(q, tables.sinks, border, sink_stop))
    return out if sink_logits is None else add_learned_sink(out, lse, sink_logits)[0]
