"""Attention over contiguous keys, float32, by the formula: the meaning that kernels are held to."""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import add_learned_sink
from pallas_kernels.visibility import PageLag, visible


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_position: jax.Array,
    k_position: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    sink_tokens: int = 0,
    lag: PageLag | None = None,
    soft_cap: float | None = None,
    sink_logits: jax.Array | None = None,
    q_sink: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`sum_j p_j v_j`, `p_j = exp(s_j) / (sum_j exp(s_j) + exp(sink_logit))` over visible keys.

    `s = scale * q.k`, then `soft_cap * tanh(s / soft_cap)` (Gemma 2). No tiling, no pages.

    Args:
      q: `[batch, q_tokens, q_heads, head_dim]`.
      k: `[batch, kv_tokens, kv_heads, head_dim]`; `kv_heads` divides `q_heads`.
      v: like `k`.
      q_position: `i32[batch, q_tokens]`; negative for rows that see nothing.
      k_position: `i32[batch, kv_tokens]`; negative for keys that nobody sees.
      scale: usually `head_dim ** -0.5`.
      window: tokens a query sees, itself included; None for all.
      sink_tokens: first tokens, visible whatever the window.
      lag: how many pages behind the query's own a key must lie; None for any number.
      soft_cap: bound on scores; None for none.
      sink_logits: `[q_heads]`, learned, joins the denominator only.
      q_sink: like `q`; the query that attends the first `sink_tokens` keys.

    Returns:
      `out`, `f32` shaped like `q`, and `lse`, `f32[batch, q_tokens, q_heads]`; 0 and `-inf` where
      nothing is visible.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    score = _scores(q, k)
    if q_sink is not None:
        is_sink = (k_position < sink_tokens)[:, None, None]  # [batch, 1, 1, kv_tokens]
        score = jnp.where(is_sink, _scores(q_sink, k), score)
    score = score * scale
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    i, j = q_position[:, :, None], k_position[:, None, :]
    sees = visible(i, j, window=window, sink_tokens=sink_tokens, lag=lag) & (i >= 0) & (j >= 0)
    score = jnp.where(sees[:, None], score, -jnp.inf)
    lse = jax.nn.logsumexp(score, axis=-1)  # [batch, q_heads, q_tokens]
    p = jnp.exp(score - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    v = jnp.where(jnp.any(sees, axis=1)[:, :, None, None], v, 0.0)  # 0 * NaN is NaN
    out = jnp.einsum("bhqk,bkhd->bqhd", p, v, precision="highest")
    lse = jnp.swapaxes(lse, 1, 2)
    return (out, lse) if sink_logits is None else add_learned_sink(out, lse, sink_logits)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """`f32[batch, q_heads, q_tokens, kv_tokens]`, unscaled."""
    return jnp.einsum("bqhd,bkhd->bhqk", q.astype(jnp.float32), k, precision="highest")
