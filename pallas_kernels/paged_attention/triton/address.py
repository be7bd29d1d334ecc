"""Where a block's tokens stand in the pools, and how a kernel loads their rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def along(x, axis: int):
    """A vector as a matrix whose `axis` it runs along; scalars stay as they are."""
    return x if jnp.ndim(x) == 0 else x[:, None] if axis == 0 else x[None, :]


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a block's tokens stand: one page and a slice of it, or a page and a slot per token."""

    layer: Any
    head: Any
    page: Any  # i32[] or i32[tokens]
    slot: Any  # pl.ds or i32[tokens]
    tokens: int
    place: Any  # the page's slot in the table, shaped like page
    inside: Any = None  # bool[tokens] of those that may be read; None for all

    def load(self, ref, columns, *, dims_first: bool = False) -> jax.Array:
        """`[tokens, columns]`, or with `dims_first` the other way round; zero where not inside.

        `columns` is `pl.ds` or `i32[columns]`. With `dims_first` words are loaded in that order,
        not transposed afterwards: 16-bit values then leave shared memory as the matrix units want
        them (ldmatrix), while a transpose would write them to shared memory again.
        """
        if isinstance(columns, pl.Slice) and jnp.ndim(self.page) == 0 and not dims_first:
            at = ref.at[self.layer, self.page, self.head, self.slot, columns]
            return self._load(at, ref.dtype, (self.tokens, columns.size))
        # Slices and vectors of indices do not mix in the interpreter.
        slot = self.slot
        if jnp.ndim(self.page) == 0:
            slot = slot.start + jnp.arange(self.tokens, dtype=jnp.int32)
        if isinstance(columns, pl.Slice):
            columns = columns.start + jnp.arange(columns.size, dtype=jnp.int32)
        shape = (self.tokens, columns.shape[0])
        shape, axis = (shape[::-1], 1) if dims_first else (shape, 0)
        spread = lambda x, runs: jnp.broadcast_to(along(x, runs), shape)
        page, slot, columns = spread(self.page, axis), spread(slot, axis), spread(columns, 1 - axis)
        at = ref.at[self.layer, page, self.head, slot, columns]
        return self._load(at, ref.dtype, shape, axis)

    def load_factor(self, ref, row: int) -> jax.Array:
        """`[tokens]`, words as stored; zero where not inside."""
        at = ref.at[self.layer, self.page, jnp.full((), row, jnp.int32), self.head, self.slot]
        return self._load(at, ref.dtype, (self.tokens,))

    def _load(self, at, dtype, shape, axis: int = 0):
        """Loads with the mask that there is; `axis` is the tokens'."""
        if self.inside is None:
            return plgpu.load(at)
        inside = self.inside if len(shape) == 1 else along(self.inside, axis)
        # No arithmetic could hide a NaN of the values afterwards: 0 * NaN is NaN.
        return plgpu.load(at, mask=jnp.broadcast_to(inside, shape), other=jnp.zeros((), dtype))
