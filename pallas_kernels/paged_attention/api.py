"""Checks a call, narrows it to what can be seen, picks who serves it, adds the learned sink."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.backends import Backend, choose_backend
from pallas_kernels.paged_attention import gpu, reference, xla
from pallas_kernels.pages import Pages
from pallas_kernels.segments import add_learned_sink
from pallas_kernels.shapes import bind_dims
from pallas_kernels.visibility import PageLag, seen_span

BACKENDS: tuple[Backend, ...] = ("xla", "reference", "gpu")


def choose(
    backend: Backend | None,
    pages: Pages,
    *,
    q_tokens: int,
    q_heads: int,
    platform: str | None = None,
) -> Backend:
    """Which backend serves a call: the named one, or the platform's where it can.

    Args:
      backend: as given to `paged_attention`.
      pages: shapes and dtypes are enough.
      q_tokens: query tokens a sequence.
      q_heads: query heads.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the named backend does not serve this; the message says why.
    """
    why = gpu.refusal(pages, q_tokens=q_tokens, q_heads=q_heads, platform=platform)
    return choose_backend("paged_attention", backend, BACKENDS, platform, gpu_refusal=why)


def paged_attention(
    q: jax.Array,
    pages: Pages,
    page_table: jax.Array,
    *,
    layer: int | jax.Array,
    q_start: jax.Array,
    q_lens: jax.Array,
    kv_start: jax.Array,
    kv_stop: jax.Array,
    scale: float,
    window: int | None = None,
    sink_tokens: int = 0,
    lag: PageLag | None = None,
    sink_table: jax.Array | None = None,
    soft_cap: float | None = None,
    sink_logits: jax.Array | None = None,
    out_dtype: DTypeLike = jnp.float32,
    backend: Backend | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends a few new tokens (decode, verify) or a chunk of them (prefill) to cached tokens.

    Query `t` of a sequence stands at position `i = q_start + t` and sees key `j` of the segment
    `kv_start <= j < kv_stop` iff `j <= i and (window is None or i - j < window or
    j < sink_tokens)` and `lag`, if given, serves the pair. Keys of the new tokens must have been
    written already. Probabilities are `exp(s_j) / (sum_j exp(s_j) + exp(sink_logit))`, `s`
    scaled, then soft-capped.

    Args:
      q: `[batch, q_tokens, q_heads, head_dim]`, any float dtype, not rotated by a codec.
      pages: exact or coded pools; their `kv_heads` divides `q_heads`.
      page_table: `i32[batch, width]`, a ring: logical page `g` stands in slot `g % width`. Entries
        of pages outside the segment are not read.
      layer: index into the pools' first axis, static or traced.
      q_start: `i32[batch]`, position of the first query token.
      q_lens: `i32[batch]`, query tokens that count; later rows see nothing.
      kv_start: `i32[batch]`, first position of the segment.
      kv_stop: `i32[batch]`, one past its last position; at most `width` pages from `kv_start`.
      scale: usually `head_dim ** -0.5`.
      window: tokens a query sees, itself included; None for all.
      sink_tokens: first tokens, visible whatever the window.
      lag: how many pages behind the query's own a key must lie; None for any number.
      sink_table: `i32[batch, sink_pages]`, further pages of the same pools, read besides the
        segment: logical pages `0 .. sink_pages`, up to `kv_stop`; `lag` does not count there.
        The segment must begin behind them.
      soft_cap: bound on scores (Gemma 2); None for none.
      sink_logits: `f32[q_heads]`, learned, in the denominator only (gpt-oss).
      out_dtype: of `out`; a part that is to be merged wants float32.
      backend: who computes; None picks by platform.

    Returns:
      `out`, shaped like `q`, and `lse`, `f32[batch, q_tokens, q_heads]`, natural log. With
      `sink_logits` it includes them; without, this is a segment's part, ready to merge. Rows
      that see nothing give 0 and `-inf`.

    Raises:
      ValueError: shapes disagree.
      NotImplementedError: the named backend does not serve this op.
    """
    dims = pages.dims
    sizes = bind_dims(
        q=(q, "batch q_tokens q_heads head_dim"),
        page_table=(page_table, "batch width"),
        sink_table=(sink_table, "batch sink_pages"),
        q_start=(q_start, "batch"),
        q_lens=(q_lens, "batch"),
        kv_start=(kv_start, "batch"),
        kv_stop=(kv_stop, "batch"),
        sink_logits=(sink_logits, "q_heads"),
    )
    if sizes["head_dim"] != dims["head_dim"]:
        raise ValueError(f"q has head_dim={sizes['head_dim']}, the pages {dims['head_dim']}.")
    if sizes["q_heads"] % dims["kv_heads"]:
        raise ValueError(f"q_heads={sizes['q_heads']} must be a multiple of {dims['kv_heads']=}.")
    if lag is not None and lag.page_size != dims["page_size"]:
        raise ValueError(f"{lag.page_size=} must be the pages' {dims['page_size']}.")
    sink_span, ring_sinks = None, sink_tokens
    if sink_table is not None:
        # Sink pages are a span of their own, and nothing but tokens of the window is left outside.
        sink_stop = jnp.minimum(kv_stop, sink_table.shape[1] * dims["page_size"])
        sink_span = seen_span(
            q_start, q_lens, 0 * kv_start, sink_stop, window=window, sink_tokens=sink_tokens
        )
        ring_sinks = 0
    kv_start, kv_stop = seen_span(
        q_start, q_lens, kv_start, kv_stop, window=window, sink_tokens=ring_sinks, lag=lag
    )
    chosen = choose(backend, pages, q_tokens=sizes["q_tokens"], q_heads=sizes["q_heads"])
    serve = {"xla": xla, "reference": reference, "gpu": gpu}[chosen]
    out, lse = serve.paged_attention(
        q,
        pages,
        page_table,
        sink_table,
        layer=layer,
        q_start=q_start,
        q_lens=q_lens,
        kv_start=kv_start,
        kv_stop=kv_stop,
        sink_span=sink_span,
        scale=scale,
        window=window,
        sink_tokens=sink_tokens,
        lag=lag,
        soft_cap=soft_cap,
        out_dtype=out_dtype if sink_logits is None else jnp.float32,
    )
    if sink_logits is None:
        return out, lse
    out, lse = add_learned_sink(out, lse, sink_logits)
    return out.astype(out_dtype), lse
