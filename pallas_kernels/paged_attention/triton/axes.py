"""Orientation of the tiles of scores and outputs, and which query each of a program's rows is."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Axes:
    """Tiles are `[rows, tokens]` (scores) and `[rows, dims]` (outputs), or `transposed`.

    `by_row` and `by_token` make a vector over rows or tokens broadcast against a tile.
    """

    transposed: bool

    @property
    def tokens(self) -> int:
        return 0 if self.transposed else 1

    def by_row(self, x):
        return x[None, :] if self.transposed else x[:, None]

    def by_token(self, x):
        return x[:, None] if self.transposed else x[None, :]

    def scores(self, k, q):
        """Dots of keys `[tokens, columns]` and queries `[rows, columns]`."""
        return dot(k, q.T) if self.transposed else dot(q, k.T)

    def outputs(self, p, v):
        """Probabilities times values, both in this orientation."""
        return dot(v, p) if self.transposed else dot(p, v)

    def shape(self, rows, n):
        return (n, rows) if self.transposed else (rows, n)

    # Running sums over tokens. If not transposed, several warps share a row's tokens, and adding up
    # their sums takes a trip through shared memory. So each place of a block keeps its own sum, and
    # a single trip at the end (`total`) is enough.

    def no_sum(self, rows, block):
        return jnp.zeros((rows,) if self.transposed else (rows, block), jnp.float32)

    def add(self, total, shrink, x):
        if self.transposed:
            return total * shrink + jnp.sum(x, axis=0)
        return total * shrink[:, None] + x

    def total(self, total):
        return total if self.transposed else jnp.sum(total, axis=1)


def dot(a, b):
    """Matrix product with float32 sums; float32 operands are multiplied in full precision."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def row_index(rows: int, *, group: int, q_tokens: int):
    """Query token, and query head within the group, of each row; padding rows repeat the last."""
    row = jnp.minimum(jnp.arange(rows, dtype=jnp.int32), group * q_tokens - 1)
    if q_tokens == 1:
        return jnp.zeros_like(row), row
    return row // group, row % group
