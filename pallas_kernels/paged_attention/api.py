"""The op `paged_attention`: checks a call and picks the backend that serves it."""

from types import ModuleType

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.backends import Backend, choose_backend
from pallas_kernels.checks import (
    check_filled,
    check_floats,
    check_types,
    int32s,
    layer_index,
    positive_number,
)
from pallas_kernels.paged_attention import reference, triton, xla
from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, Queries, Segment
from pallas_kernels.shapes import bind_dims
from pallas_kernels.x32 import in_32_bits

BACKENDS: dict[Backend, ModuleType] = {"xla": xla, "reference": reference, "gpu": triton}


def choose(
    backend: Backend | None,
    pages: Pages,
    *,
    q_tokens: int,
    q_heads: int,
    platform: str | None = None,
) -> Backend:
    """Which backend serves a call: the named one, or the platform's best.

    Args:
      backend: as given to `paged_attention`.
      pages: shapes and dtypes are enough.
      q_tokens: query tokens per sequence.
      q_heads: query heads.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the named backend does not serve this; the message says why.
    """
    call = dict(pages=pages, q_tokens=q_tokens, q_heads=q_heads)
    return choose_backend("paged_attention", backend, BACKENDS, platform, **call)


def paged_attention(
    queries: Queries,
    pages: Pages,
    segment: Segment,
    rule: Rule,
    *,
    layer: int | jax.Array,
    scale: float,
    soft_cap: float | None = None,
    out_dtype: DTypeLike = jnp.float32,
    backend: Backend | None = None,
) -> Part:
    """Attends a few new tokens (decode, verify) or a chunk of them (prefill) to cached tokens.

    Query `t` of a sequence stands at position `i = queries.start + t` and sees the keys of the
    segment that `rule` allows. Keys of the new tokens must have been written already.
    Probabilities are `exp(s_j) / sum_j exp(s_j)`; scores `s = scale * q.k` are soft-capped if
    `soft_cap` is given. The result covers this segment only: merge it with the parts of other
    segments and with a learned sink by `pallas_kernels.segment`.

    Args:
      queries: the new tokens' queries, not rotated by a codec.
      pages: the pools; their `kv_heads` divides `q_heads`.
      segment: which pages of each sequence are read.
      rule: which of their keys a query sees; static.
      layer: index into the pools' first axis, static or traced.
      scale: a positive number, usually `head_dim ** -0.5`.
      soft_cap: bound on scores, `soft_cap * tanh(s / soft_cap)` (Gemma 2); None for none.
      out_dtype: dtype of `Part.out`; use float32 for a part that will be merged.
      backend: "gpu", "xla" or "reference"; None picks by platform.

    Returns:
      `out`, shaped like `queries.q`, and `lse`, `f32[batch, q_tokens, q_heads]`. Rows that see
      nothing give 0 and `-inf`.

    Raises:
      ValueError: an argument of a wrong type, kind of numbers, shape or range; a static `layer`
        that is not there; a rule that makes no sense.
      NotImplementedError: the named backend does not serve this call.
    """
    if not jnp.issubdtype(out_dtype, jnp.floating):
        raise ValueError(f"out_dtype={jnp.dtype(out_dtype)} must be a float type.")
    out_dtype = jnp.dtype(out_dtype)
    computed = jnp.dtype(jnp.float32) if out_dtype.itemsize > 4 else out_dtype
    options = dict(layer=layer, scale=scale, soft_cap=soft_cap, out_dtype=computed, backend=backend)
    part = _attend(queries, pages, segment, rule, **options)
    return part if computed == out_dtype else part._replace(out=part.out.astype(out_dtype))


@in_32_bits
def _attend(
    queries: Queries,
    pages: Pages,
    segment: Segment,
    rule: Rule,
    *,
    layer,
    scale,
    soft_cap,
    out_dtype,
    backend,
) -> Part:
    """Checks the call, and makes it."""
    check_types(
        queries=(queries, Queries), pages=(pages, Pages), segment=(segment, Segment),
        rule=(rule, Rule),
    )  # fmt: skip
    dims, rule = pages.dims, rule.checked()
    sizes = bind_dims(
        q=(queries.q, "batch q_tokens q_heads head_dim"),
        page_table=(segment.table, "batch width"),
        sink_table=(segment.sinks, "batch sink_pages"),
        q_start=(queries.start, "batch"),
        q_lens=(queries.lens, "batch"),
        kv_start=(segment.start, "batch"),
        kv_stop=(segment.stop, "batch"),
    )
    check_filled(sizes)
    check_floats(q=queries.q)
    queries, segment = _with_int32(queries, segment)
    if sizes["head_dim"] != dims["head_dim"]:
        raise ValueError(f"q has head_dim={sizes['head_dim']}, the pages {dims['head_dim']}.")
    if sizes["q_heads"] % dims["kv_heads"]:
        raise ValueError(f"q_heads={sizes['q_heads']} must be a multiple of {dims['kv_heads']=}.")
    if rule.lag is not None and rule.lag.page_size != dims["page_size"]:
        raise ValueError(f"{rule.lag.page_size=} must be the pages' {dims['page_size']}.")
    chosen = choose(backend, pages, q_tokens=sizes["q_tokens"], q_heads=sizes["q_heads"])
    return BACKENDS[chosen].paged_attention(
        queries,
        pages,
        segment,
        rule,
        layer=layer_index(layer, dims["layers"]),
        scale=positive_number("scale", scale),
        soft_cap=None if soft_cap is None else positive_number("soft_cap", soft_cap),
        out_dtype=out_dtype,
    )


def _with_int32(queries: Queries, segment: Segment) -> tuple[Queries, Segment]:
    """The same with all tables, positions and lengths as int32."""
    start, lens, table, kv_start, kv_stop = int32s(
        q_start=queries.start,
        q_lens=queries.lens,
        page_table=segment.table,
        kv_start=segment.start,
        kv_stop=segment.stop,
    )
    sinks = segment.sinks
    if sinks is not None:
        [sinks] = int32s(sink_table=sinks)
    return Queries(queries.q, start, lens), Segment(table, kv_start, kv_stop, sinks)
