"""Gathers the whole segment, dequantized, and applies the formula in float32. For tests."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, Queries, Segment, merge


def refusal(**call) -> None:
    """Serves every call."""
    del call


def paged_attention(
    queries: Queries,
    pages: Pages,
    segment: Segment,
    rule: Rule,
    *,
    layer,
    scale,
    soft_cap,
    out_dtype,
) -> Part:
    """See `api.paged_attention`."""

    def attend(table, start, stop, rule):
        k, v, entry = _read(pages, layer, table, start, stop)
        return dense_attention(
            queries.q, k, v, queries.positions, entry, scale=scale, rule=rule, soft_cap=soft_cap
        )

    part = attend(segment.table, segment.start, segment.stop, rule)
    if segment.sinks is not None:
        stop = jnp.minimum(segment.stop, segment.sinks.shape[1] * pages.dims["page_size"])
        start, pinned = jnp.zeros_like(stop), dataclasses.replace(rule, lag=None)
        part = merge(part, attend(segment.sinks, start, stop, pinned))
    return Part(part.out.astype(out_dtype), part.lse)


def _read(pages: Pages, layer, table, start, stop) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values `[batch, entries, kv_heads, head_dim]`, and entry numbers, -1 if outside."""
    page_size, width = pages.dims["page_size"], table.shape[1]
    # The one page in first .. first + width - 1 that each slot of the ring can hold.
    first = (start // page_size)[:, None]
    logical = first + (jnp.arange(width, dtype=jnp.int32)[None] - first) % width
    slot = jnp.arange(page_size, dtype=jnp.int32)[None, None]
    entry = (logical[:, :, None] * page_size + slot).reshape(len(table), -1)
    inside = (entry >= start[:, None]) & (entry < stop[:, None])

    def flatten(x):
        x = jnp.swapaxes(x, 2, 3)
        return x.reshape(x.shape[0], width * page_size, *x.shape[3:])

    k, v = _dequantized(pages, layer, table)
    return flatten(k), flatten(v), jnp.where(inside, entry, -1)


def _dequantized(pages: Pages, layer, page) -> tuple[jax.Array, jax.Array]:
    """Keys and values of whole pages, dequantized and rotated back, `f32`."""
    codec = pages.layout.codec
    key, value = pages.layout.unpack({name: x[layer, page] for name, x in pages.arrays.items()})
    k = codec.key.dequantize(key)
    mean = pages.means(layer, page)
    if mean is not None:
        k = k + mean[..., None, :].astype(jnp.float32)
    return codec.key.unrotate(k), codec.value.unrotate(codec.value.dequantize(value))
