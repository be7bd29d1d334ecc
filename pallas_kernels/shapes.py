"""Arithmetic on shapes: axes of several arrays checked from one table of names, ceilings."""

from typing import Any

import jax

# An operand of a kernel: an array when it is called, a ref inside, and before that its shape.
Operand = Any


def bind_dims(**arrays: tuple[jax.Array | None, str]) -> dict[str, int]:
    """Binds axis names to sizes: `bind_dims(q=(q, "batch heads dim"), lens=(lens, "batch"))`.

    An array that is None, an argument left out, is skipped.

    Returns:
      Size of each axis name.

    Raises:
      ValueError: a wrong rank, or one name with two sizes.
    """
    sizes: dict[str, int] = {}
    for name, (array, axes) in arrays.items():
        if array is None:
            continue
        names = axes.split()
        if array.ndim != len(names):
            raise ValueError(f"{name}.shape={array.shape} must be [{', '.join(names)}].")
        for axis, size in zip(names, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"{name}.shape={array.shape}: {axis} must be {sizes[axis]}.")
    return sizes


def cdiv(a, b):
    """Smallest integer that is at least `a / b`, of ints or integer arrays, also negative ones."""
    return -(-a // b)
