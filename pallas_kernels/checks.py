"""What the ops refuse before they look at anything else: wrong types, kinds of numbers, ranges.

Each check names the argument, the rule and the value in one sentence. Only what is known when a
program is traced is checked; values inside arrays are not.
"""

import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MOST_INT = 2**31 - 1  # counts, positions and ids of tokens and pages are int32


def check_types(**values: tuple[Any, type]) -> None:
    """Raises ValueError unless each value is of its type: `check_types(rule=(rule, Rule))`."""
    for name, (value, kind) in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__}, not {type(value).__name__}.")


def check_floats(**arrays) -> None:
    """Raises ValueError unless each is an array of real floats; None, for one left out, passes."""
    for name, array in arrays.items():
        if array is None:
            continue
        if not hasattr(array, "dtype"):
            raise ValueError(f"{name} must be an array, not {shown(array)}.")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype={array.dtype} must be a float type.")


def check_bools(**arrays) -> None:
    """Raises ValueError unless each array is a mask."""
    for name, array in arrays.items():
        if array.dtype != jnp.bool_:
            raise ValueError(f"{name}.dtype={array.dtype} must be bool.")


def int32s(**arrays) -> list[jax.Array]:
    """The arrays as int32; raises ValueError unless they hold integers."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name}.dtype={array.dtype} must be int32.")
    return [jnp.asarray(array).astype(jnp.int32) for array in arrays.values()]


def check_filled(sizes: dict[str, int]) -> None:
    """Raises ValueError for an axis of no elements; `sizes` as `bind_dims` returns them."""
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"{axis}={size} must be at least 1.")


def whole_number(name: str, value, *, least: int, most: int = MOST_INT, hint: str = "") -> int:
    """`value` as an int; raises ValueError unless it is one, and within the bounds.

    `hint` says after the lower bound what else is allowed.
    """
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value} must be a whole number, not a bool.")
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={shown(value)} must be a whole number.") from None
    if whole < least:
        rule = "must not be negative" if least == 0 else f"must be at least {least}"
        raise ValueError(f"{name}={shown(whole)} {rule}{hint}.")
    if whole > most:
        raise ValueError(f"{name}={shown(whole)} must be at most {most}.")
    return whole


def shown(value: object) -> str:
    """A value in a message: arrays by dtype and shape, others shortened to a few words."""
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    try:
        text = repr(value).replace("\n", " ")
    except ValueError:  # Python writes no integers of thousands of digits
        text = f"a {type(value).__name__} too long to be written"
    return text if len(text) <= 60 else f"{text[:57]}..."


def positive_number(name: str, value) -> float:
    """`value` as a float; raises ValueError unless it is a known, finite, positive number."""
    if isinstance(value, Tracer):
        raise ValueError(f"{name} must be a number, not a traced array: kernels are built for it.")
    scalar = getattr(value, "shape", None) == () and jnp.issubdtype(value.dtype, jnp.floating)
    if isinstance(value, bool) or not (scalar or isinstance(value, numbers.Real)):
        raise ValueError(f"{name}={value!r} must be a number.")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}={number} must be positive and finite.")
    return number


def layer_index(layer, layers: int) -> jax.Array | int:
    """The index of a layer; raises ValueError unless it is a whole number and, if known, exists."""
    if not hasattr(layer, "dtype"):
        return whole_number("layer", layer, least=0, most=layers - 1)
    if layer.shape != () or not jnp.issubdtype(layer.dtype, jnp.integer):
        raise ValueError(f"layer must be one integer, not {layer.dtype}{list(layer.shape)}.")
    if isinstance(layer, Tracer):
        return jnp.asarray(layer).astype(jnp.int32)
    return whole_number("layer", layer, least=0, most=layers - 1)
