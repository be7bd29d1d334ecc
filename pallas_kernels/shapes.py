"""Checks the axes of several arrays against one table of names; arithmetic of sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# An operand of a kernel: an array for the caller, a ref inside the kernel, and a
# ShapeDtypeStruct where an output is declared.
Operand = Any


def bind_dims(**arrays: tuple[jax.Array | None, str]) -> dict[str, int]:
    """Binds axis names to sizes: `bind_dims(q=(q, "batch heads dim"), lens=(lens, "batch"))`.

    An array that is None (an optional argument that was left out) is skipped.

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


def larger(x, y) -> Any:
    """Elementwise maximum, by NumPy where `x` is its array, on the host, and else by JAX."""
    return np.maximum(x, y) if isinstance(x, np.ndarray) else jnp.maximum(x, y)


def smaller(x, y) -> Any:
    """Elementwise minimum, by NumPy where `x` is its array, on the host, and else by JAX."""
    return np.minimum(x, y) if isinstance(x, np.ndarray) else jnp.minimum(x, y)
