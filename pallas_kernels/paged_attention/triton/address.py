"""Where a block's tokens are in the pools, and how a kernel loads their rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def along(x, axis: int):
    """Makes a vector a matrix that varies along `axis`; leaves scalars unchanged."""
    return x if jnp.ndim(x) == 0 else x[:, None] if axis == 0 else x[None, :]


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a block's tokens are: one page and a slice of it, or a page and a slot per token."""

    layer: Any  # i32[]
    head: Any  # i32[], kv head
    page: Any  # i32[] or i32[tokens], page ids
    slot: Any  # pl.ds or i32[tokens], places in the page
    tokens: int
    place: Any  # like page, the slot of the page table that names the page
    inside: Any = None  # bool[tokens], which tokens may be read; None for all

    def load(self, ref, columns, *, dims_first: bool = False) -> jax.Array:
        """Loads `[tokens, columns]`, or `[columns, tokens]` with `dims_first`; zero if not inside.

        `columns` is `pl.ds` or `i32[columns]`. With `dims_first` words are loaded in that order,
        not transposed afterwards: 16-bit values then go from shared memory to the matrix units in
        the order these need (ldmatrix), while a transpose would write them to shared memory again.
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
        """Loads row `row` of factor words, `[tokens]`, as stored; zero where not inside."""
        at = ref.at[self.layer, self.page, jnp.full((), row, jnp.int32), self.head, self.slot]
        return self._load(at, ref.dtype, (self.tokens,))

    def _load(self, at, dtype, shape, axis: int = 0):
        """Loads, masked by `inside` if there is a mask; tokens are on `axis`."""
        if self.inside is None:
            return plgpu.load(at)
        inside = self.inside if len(shape) == 1 else along(self.inside, axis)
        # The load itself must hide what is outside: it may be NaN, and 0 * NaN is NaN.
        return plgpu.load(at, mask=jnp.broadcast_to(inside, shape), other=jnp.zeros((), dtype))
