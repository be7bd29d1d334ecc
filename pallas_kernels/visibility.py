"""The rules of which key a query sees; every backend and the reference share them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PageLag(NamedTuple):
    """Pages a store serves, counted back from the query's own: `least <= lag < most`.

    With a lossy codec recent keys are read exactly and older ones as codes; which of the two
    depends on positions alone, never on how the tokens came in.
    """

    page_size: int
    least: int = 0
    most: int | None = None

    def serves(self, q_position: jax.Array, k_position: jax.Array) -> jax.Array:
        """Whether the store serves key and query, broadcast."""
        lag = q_position // self.page_size - k_position // self.page_size
        near = True if self.most is None else lag < self.most
        return (lag >= self.least) & near


def visible(
    q_position: jax.Array,
    k_position: jax.Array,
    *,
    window: int | None,
    sink_tokens: int,
    lag: PageLag | None = None,
) -> jax.Array:
    """`j <= i and (window is None or i - j < window or j < sink_tokens)`, broadcast.

    The window counts the query itself (Mistral); the first `sink_tokens` tokens stay visible
    behind it (StreamingLLM, arXiv:2309.17453). `lag` further limits the keys to a store's.
    """
    sees = k_position <= q_position
    if window is not None:
        near = q_position - k_position < window
        if sink_tokens:
            near = near | (k_position < sink_tokens)
        sees = sees & near
    return sees if lag is None else sees & lag.serves(q_position, k_position)


def seen_span(
    q_start: jax.Array,
    q_lens: jax.Array,
    kv_start: jax.Array,
    kv_stop: jax.Array,
    *,
    window: int | None,
    sink_tokens: int,
    lag: PageLag | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Narrows `kv_start <= j < kv_stop` to what some query can see, all `i32[batch]`.

    With one query token the span says all: every key of it is visible. Without query tokens it
    is empty.
    """
    q_stop = q_start + q_lens
    kv_stop = jnp.minimum(kv_stop, q_stop)
    if window is not None and not sink_tokens:
        kv_start = jnp.maximum(kv_start, q_start - window + 1)
    if lag is not None:
        size = lag.page_size
        if lag.most is not None:
            kv_start = jnp.maximum(kv_start, (q_start // size - lag.most + 1) * size)
            if lag.most <= lag.least:  # a store of nothing but sink pages
                kv_stop = kv_start
        if lag.least:
            kv_stop = jnp.minimum(kv_stop, ((q_stop - 1) // size - lag.least + 1) * size)
    return kv_start, jnp.where(q_lens > 0, jnp.maximum(kv_stop, kv_start), kv_start)
