"""The rules for numbers and switches that come from files, checked before anything uses them.

`name` is what an error calls the value: "config.json: hidden_size".
"""

from typing import Any

from models.errors import CheckpointError

MOST = 2**31 - 1  # positions, tokens and sizes of axes are int32 in JAX
LEAST_FLOAT, MOST_FLOAT = 1e-30, 1e30  # float32 has room left on both sides, to compute in

# Numbers that lengthen tables before a tensor's shape could contradict them. Published models have
# up to 126 layers, and heads of up to 512 channels.
MOST_LAYERS = 4096
MOST_HEAD_DIM = 1 << 16
MOST_DIMS = 8  # axes of a tensor; published ones have up to 5


def whole_number(name: str, value: Any, *, least: int = 1, most: int = MOST) -> int:
    """`value` as an int; CheckpointError unless it is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CheckpointError(f"{name}={value!r} must be a whole number, at least {least}.")
    if value > most:
        raise CheckpointError(f"{name}={value!r} must be at most {most}.")
    return int(value)


def positive_number(name: str, value: Any) -> float:
    """`value` as a float; CheckpointError unless it is a number above 0 that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{name}={value!r} must be a number above 0.")
    if not LEAST_FLOAT <= value <= MOST_FLOAT:
        raise CheckpointError(f"{name}={value!r} must be from {LEAST_FLOAT} to {MOST_FLOAT}.")
    return float(value)


def not_negative_number(name: str, value: Any) -> float:
    """`value` as a float: 0, or what `positive_number` takes."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise CheckpointError(f"{name}={value!r} must be a number, not negative.")
    return positive_number(name, value)


def switch(name: str, value: Any) -> bool:
    """`value`; CheckpointError unless it is true or false."""
    if not isinstance(value, bool):
        raise CheckpointError(f"{name}={value!r} must be true or false.")
    return value


def token_id(name: str, value: Any) -> int:
    """`value` as a token id; CheckpointError unless it is a whole number from 0 to `MOST`."""
    return whole_number(name, value, least=0)
