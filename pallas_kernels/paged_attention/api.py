"""Checks a call, picks who serves it, and finishes the learned sink."""

import jax

from pallas_kernels.backends import Backend, choose_backend
from pallas_kernels.paged_attention import reference, xla
from pallas_kernels.segments import add_learned_sink
from pallas_kernels.shapes import bind_dims

BACKENDS: tuple[Backend, ...] = ("xla", "reference")


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
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
    soft_cap: float | None = None,
    sink_logits: jax.Array | None = None,
    backend: Backend | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends a few new tokens (decode, verify) or a chunk of them (prefill) to cached tokens.

    Query `t` of a sequence stands at position `i = q_start + t` and sees key `j` of the segment
    `kv_start <= j < kv_stop` iff `j <= i and (window is None or i - j < window or
    j < sink_tokens)`. Keys of the new tokens must have been written already. Probabilities are
    `exp(s_j) / (sum_j exp(s_j) + exp(sink_logit))`, `s` scaled, then soft-capped.

    Args:
      q: `[batch, q_tokens, q_heads, head_dim]`, any float dtype.
      k_pages: `[layers, pages, kv_heads, page_size, head_dim]`; `kv_heads` divides `q_heads`.
      v_pages: like `k_pages`.
      page_table: `i32[batch, width]`, a ring: logical page `g` stands in slot `g % width`. Entries
        of pages outside the segment are not read.
      layer: index into the pages' first axis, static or traced.
      q_start: `i32[batch]`, position of the first query token.
      q_lens: `i32[batch]`, query tokens that count; later rows see nothing.
      kv_start: `i32[batch]`, first position of the segment.
      kv_stop: `i32[batch]`, one past its last position; at most `width` pages from `kv_start`.
      scale: usually `head_dim ** -0.5`.
      window: tokens a query sees, itself included; None for all.
      sink_tokens: first tokens, visible whatever the window.
      soft_cap: bound on scores (Gemma 2); None for none.
      sink_logits: `f32[q_heads]`, learned, in the denominator only (gpt-oss).
      backend: who computes; None picks by platform.

    Returns:
      `out`, `f32` shaped like `q`, and `lse`, `f32[batch, q_tokens, q_heads]`, natural log. With
      `sink_logits` it includes them; without, this is a segment's part, ready to merge. Rows
      that see nothing give 0 and `-inf`.

    Raises:
      ValueError: shapes disagree.
      NotImplementedError: the named backend does not serve this op.
    """
    sizes = bind_dims(
        q=(q, "batch q_tokens q_heads head_dim"),
        k_pages=(k_pages, "layers pages kv_heads page_size head_dim"),
        v_pages=(v_pages, "layers pages kv_heads page_size head_dim"),
        page_table=(page_table, "batch width"),
        q_start=(q_start, "batch"),
        q_lens=(q_lens, "batch"),
        kv_start=(kv_start, "batch"),
        kv_stop=(kv_stop, "batch"),
        sink_logits=(sink_logits, "q_heads"),
    )
    if sizes["q_heads"] % sizes["kv_heads"]:
        raise ValueError(f"q_heads={sizes['q_heads']} must be a multiple of {sizes['kv_heads']=}.")
    serve = {"xla": xla, "reference": reference}[
        choose_backend("paged_attention", backend, BACKENDS)
    ]
    out, lse = serve.paged_attention(
        q,
        k_pages,
        v_pages,
        page_table,
        layer=layer,
        q_start=q_start,
        q_lens=q_lens,
        kv_start=kv_start,
        kv_stop=kv_stop,
        scale=scale,
        window=window,
        sink_tokens=sink_tokens,
        soft_cap=soft_cap,
    )
    return (out, lse) if sink_logits is None else add_learned_sink(out, lse, sink_logits)
