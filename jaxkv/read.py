"""Attention of new tokens over a sequence's segments: the body, the recent pages, the sinks."""

import jax
import jax.numpy as jnp

from jaxkv.config import LayerGroup
from jaxkv.store import GroupState, Store
from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.segments import add_learned_sink, merge


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

    def segment(q, store: Store, table, kv_start, kv_stop, **options):
        return paged_attention(
            q,
            store.pages,
            table,
            layer=layer,
            q_start=lengths,
            q_lens=pending,
            kv_start=kv_start,
            kv_stop=kv_stop,
            scale=scale,
            window=group.spec.window,
            soft_cap=soft_cap,
            backend=backend,
            **options,
        )

    parts = []
    single = len(state.stores) == 1 and q_sink is None and sink_logits is None
    for store in state.stores:
        lag, sinks = store.spec.lag, store.tables.sinks
        options: dict = {"out_dtype": q.dtype if single else jnp.float32}
        if (lag.least, lag.most) != (0, None):
            options["lag"] = lag
        if store.spec.sink_pages and q_sink is None:
            options |= {"sink_table": sinks, "sink_tokens": group.spec.sink_tokens}
        start = store.spec.first_page(lengths) * lag.page_size
        parts.append(segment(q, store, store.tables.ring, start, stop, **options))
        if store.spec.sink_pages and q_sink is not None:
            # The sink tokens, and only they, see the re-rotated query; others that share their
            # last page are ordinary tokens of the window.
            border = jnp.minimum(stop, group.spec.sink_tokens)
            end = jnp.minimum(stop, store.spec.sink_pages * lag.page_size)
            options = {"sink_tokens": group.spec.sink_tokens}
            parts.append(segment(q_sink, store, sinks, 0 * border, border, **options))
            if group.spec.sink_tokens < store.spec.sink_pages * lag.page_size:
                parts.append(segment(q, store, sinks, border, end))
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge(out, lse, *part)
    return out if sink_logits is None else add_learned_sink(out, lse, sink_logits)[0]
