"""The one rule of which key a query sees; every backend and the reference share it."""

import jax


def visible(
    q_position: jax.Array, k_position: jax.Array, *, window: int | None, sink_tokens: int
) -> jax.Array:
    """`j <= i and (window is None or i - j < window or j < sink_tokens)`, broadcast.

    The window counts the query itself (Mistral); the first `sink_tokens` tokens stay visible
    behind it (StreamingLLM, arXiv:2309.17453).
    """
    causal = k_position <= q_position
    if window is None:
        return causal
    near = q_position - k_position < window
    if sink_tokens:
        near = near | (k_position < sink_tokens)
    return causal & near
