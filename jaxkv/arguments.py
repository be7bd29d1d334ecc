"""Checks of arguments that people pass: what kind of value each is, in one line where it is not."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import MOST_INT, shown


def float_name(name: str, value: Any) -> str:
    """The name of a float type that pages can have, from anything that names a type for JAX.

    Raises:
      ValueError: the value names no type, or another one.
    """
    known = ("bfloat16", "float16", "float32")
    try:
        found = jnp.dtype(value).name if value is not None else None
        if found in known and jnp.dtype(value) != jnp.dtype(found):
            found = None  # another byte order has the same name
    except TypeError:
        found = None
    if found not in known:
        raise ValueError(f"{name}={value!r} must be {known[0]}, {known[1]} or {known[2]}.")
    return found


def counts(name: str, value: Any, batch: int) -> jax.Array:
    """`i32[batch]` from an array or list of whole numbers; ValueError for anything else."""
    array = _array(name, value)
    if array.shape != (batch,) or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be whole numbers, one per sequence, i32[{batch}]: it is {shown(array)}."
        )
    return _as_i32(array)


def mask(name: str, value: Any, batch: int) -> jax.Array:
    """`bool[batch]` from an array or list; ValueError for anything else (sequences' numbers)."""
    array = _array(name, value)
    if array.shape != (batch,) or array.dtype != np.bool_:
        raise ValueError(
            f"{name} must be true or false for each sequence, bool[{batch}]: it is {shown(array)}."
        )
    return jnp.asarray(array)


def sequence_numbers(name: str, value: Any) -> jax.Array:
    """`i32[n]` from an int or whole numbers; ValueError for anything else."""
    array = _array(name, value)
    array = array.reshape(1) if array.ndim == 0 else array
    if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be the number of a sequence, or several, i32[n]: it is {shown(array)}."
        )
    return _as_i32(array)


def _array(name: str, value: Any) -> jax.Array | np.ndarray:
    """The value as an array, not yet on a device, which would wrap integers of 64 bits."""
    if isinstance(value, jax.Array | np.ndarray):
        return value
    if isinstance(value, np.generic | numbers.Number | list | tuple):
        try:
            array = np.asarray(value)
            if array.dtype != object:
                return array
        except (ValueError, jax.errors.TracerArrayConversionError):
            pass  # a list of lists of unequal lengths, or of traced numbers
        try:
            return jnp.asarray(value)  # a list of JAX's numbers
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"{name} must be an array, not {type(value).__name__} {str(value)[:40]!r}.")


def _as_i32(array: jax.Array | np.ndarray) -> jax.Array:
    """Integers as int32; those beyond its range become its ends, as 0 would be another meaning."""
    if array.dtype == np.int32:
        return jnp.asarray(array)
    info, numpy = jnp.iinfo(array.dtype), jnp if isinstance(array, jax.Array) else np
    low, high = max(int(info.min), -MOST_INT - 1), min(int(info.max), MOST_INT)
    return jnp.asarray(numpy.clip(array, low, high).astype(np.int32))  # type: ignore[arg-type]
