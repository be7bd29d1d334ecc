"""Attention over contiguous keys in float32, by the formula: the oracle that kernels must match."""

import jax
import jax.numpy as jnp

from pallas_kernels.rule import CAUSAL, Rule
from pallas_kernels.segment import Part, add_learned_sink
from pallas_kernels.x32 import in_32_bits


@in_32_bits
def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_position: jax.Array,
    k_position: jax.Array,
    *,
    scale: float,
    rule: Rule = CAUSAL,
    soft_cap: float | None = None,
    sink_logits: jax.Array | None = None,
    q_sink: jax.Array | None = None,
) -> Part:
    """`sum_j p_j v_j`, `p_j = exp(s_j) / (sum_j exp(s_j) + exp(sink_logit))` over visible keys.

    `s = scale * q.k`, then `soft_cap * tanh(s / soft_cap)` (Gemma 2). No tiling, no pages.

    Args:
      q: `[batch, q_tokens, q_heads, head_dim]`.
      k: `[batch, kv_tokens, kv_heads, head_dim]`; `kv_heads` divides `q_heads`.
      v: like `k`.
      q_position: `i32[batch, q_tokens]`; negative for rows that see nothing.
      k_position: `i32[batch, kv_tokens]`, positions of keys (with `rule.stride`, entry numbers);
        negative for keys that no query sees.
      scale: usually `head_dim ** -0.5`.
      rule: which keys a query sees.
      soft_cap: bound on scores; None for none.
      sink_logits: `[q_heads]`, learned; `exp(sink_logits)` joins the denominator only.
      q_sink: like `q`; replaces it for the first `rule.sink_tokens` keys.

    Returns:
      `out`, `f32` shaped like `q`, and `lse`, `f32[batch, q_tokens, q_heads]`; 0 and `-inf` where
      nothing is visible. A value that is not finite makes its channel NaN in rows that see it, and
      changes no other row.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    score = _scores(q, k)
    if q_sink is not None:
        is_sink = (rule.position(k_position) < rule.sink_tokens)[
            :, None, None
        ]  # [batch, 1, 1, kv_tokens]
        score = jnp.where(is_sink, _scores(q_sink, k), score)
    score = score * scale
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    i, j = q_position[:, :, None], k_position[:, None, :]
    sees = rule.seen(i, j) & (i >= 0) & (j >= 0)
    score = jnp.where(sees[:, None], score, -jnp.inf)
    lse = jax.nn.logsumexp(score, axis=-1)  # [batch, q_heads, q_tokens]
    p = jnp.exp(score - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    finite = jnp.isfinite(v)
    out = jnp.einsum("bhqk,bkhd->bqhd", p, jnp.where(finite, v, 0.0), precision="highest")
    # Counted apart: as a term of the sum it would reach every row, because 0 * NaN is NaN.
    spoiled = jnp.einsum("bqk,bkhd->bqhd", sees.astype(jnp.float32), (~finite).astype(jnp.float32))
    out = jnp.where(spoiled > 0, jnp.nan, out)
    part = Part(out, jnp.swapaxes(lse, 1, 2))
    return part if sink_logits is None else add_learned_sink(part, sink_logits)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """`f32[batch, q_heads, q_tokens, kv_tokens]`, unscaled."""
    return jnp.einsum("bqhd,bkhd->bhqk", q.astype(jnp.float32), k, precision="highest")
