"""Checks of arguments that people pass: what kind of value each is, in one line where it is not."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_INT = 2**31 - 1  # counts, positions and token ids are int32


def check_whole(name: str, value: object, *, least: int) -> int:
    """The value as an int; ValueError unless it is a whole number from `least` to 2**31 - 1."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) <= MOST_INT:  # type: ignore[call-overload]
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}, below 2**31.")
    return int(value)  # type: ignore[call-overload]


def float_name(name: str, value: Any) -> str:
    """The name of a float type that pages can have, from anything that names a type for JAX.

    Raises:
      ValueError: the value names no type, or another one.
    """
    known = ("bfloat16", "float16", "float32")
    try:
        found = jnp.dtype(value).name if value is not None else None
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
            f"{name} must be whole numbers, one per sequence, i32[{batch}]: {_is(array)}"
        )
    return array.astype(jnp.int32)


def mask(name: str, value: Any, batch: int) -> jax.Array:
    """`bool[batch]` from an array or list; ValueError for anything else (sequences' numbers)."""
    array = _array(name, value)
    if array.shape != (batch,) or array.dtype != jnp.bool:
        raise ValueError(
            f"{name} must be true or false for each sequence, bool[{batch}]: {_is(array)}"
        )
    return array


def sequence_numbers(name: str, value: Any) -> jax.Array:
    """`i32[n]` from an int or whole numbers; ValueError for anything else."""
    array = jnp.atleast_1d(_array(name, value))
    if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be the number of a sequence, or several, i32[n]: {_is(array)}"
        )
    return array.astype(jnp.int32)


def _array(name: str, value: Any) -> jax.Array:
    if isinstance(value, jax.Array | np.ndarray | np.generic | numbers.Number | list | tuple):
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"{name} must be an array, not {type(value).__name__} {str(value)[:40]!r}.")


def _is(array: jax.Array) -> str:
    return f"it is {array.dtype}{list(array.shape)}."
