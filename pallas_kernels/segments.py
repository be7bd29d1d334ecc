"""Merging attention over disjoint key sets by their log-sum-exp, and the learned sink.

Attention over a union of key sets is the average of the parts, weighted by `exp(lse)`
(FlashAttention's split-KV, arXiv:2205.14135). A learned sink logit is one more set, with a value
of zero (gpt-oss), so it is merged once, at the end.
"""

import jax
import jax.numpy as jnp


def merge(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over two disjoint key sets from attention over each.

    Args:
      out_a: `f32[..., head_dim]`, exactly 0 where the set was empty.
      lse_a: `f32[...]`, natural log, `-inf` where the set was empty.
      out_b: like `out_a`.
      lse_b: like `lse_a`.

    Returns:
      `(out, lse)` of the union; 0 and `-inf` where both are empty.
    """
    top = jnp.maximum(lse_a, lse_b)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # -inf - -inf is NaN
    a, b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = a + b
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out = out_a * (a / total)[..., None] + out_b * (b / total)[..., None]
    return out, jnp.where(seen, top + jnp.log(total), -jnp.inf)


def add_learned_sink(
    out: jax.Array, lse: jax.Array, sink_logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds `exp(sink_logits)` to the softmax denominator and nothing to the numerator (gpt-oss).

    Args:
      out: `f32[..., q_heads, head_dim]`.
      lse: `f32[..., q_heads]`.
      sink_logits: `[q_heads]`, `-inf` for none; not multiplied by the attention scale.
    """
    sink = sink_logits.astype(jnp.float32).reshape((1,) * (lse.ndim - 1) + sink_logits.shape)
    sink = jnp.broadcast_to(sink, lse.shape)
    return merge(out, lse, jnp.zeros_like(out), sink)
