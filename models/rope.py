"""Rotary position embedding (RoFormer, arXiv:2104.09864) with the published frequency scalings.

Angles stay within 1e-3 rad up to position 10^7: float32 `position * frequency` alone is off by
0.06 rad at 10^6, so the position is split into digits of base 256, and each digit's step is
reduced mod 2 pi beforehand, in float64.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

DIGIT = 256
DIGITS = 4  # covers every int32 position
POSITIVE = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotation frequencies of one kind of layer, radians per token, fastest first."""

    frequencies: tuple[float, ...]  # head_dim / 2 of them

    @property
    def steps(self) -> np.ndarray:
        """`f32[digits, head_dim / 2]`: angle of one unit of each digit, within +-pi."""
        step = np.outer(float(DIGIT) ** np.arange(DIGITS), np.asarray(self.frequencies))
        return (step - 2 * np.pi * np.round(step / (2 * np.pi))).astype(np.float32)


def make_rope(head_dim: int, parameters: dict) -> Rope:
    """Builds frequencies from a checkpoint's `rope_parameters`.

    Args:
      head_dim: channels that are rotated, an even number.
      parameters: `rope_type` ("default", "linear", "llama3", or "factors" with explicit divisors,
        as GGUF files have them), `rope_theta`, and what the type needs.

    Raises:
      ValueError: an unknown type, or a parameter that is missing or no number above 0.
    """
    kind = parameters.get("rope_type", "default")
    for name, value in parameters.items():
        if name in POSITIVE and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{name}={value!r} must be a number above 0.")
    try:
        theta = float(parameters["rope_theta"])
        frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if kind == "default":
            pass
        elif kind == "linear":
            frequency = frequency / float(parameters["factor"])
        elif kind == "llama3":
            frequency = _llama3(frequency, parameters)
        elif kind == "factors":
            frequency = frequency / np.asarray(parameters["factors"], np.float64)
        else:
            raise ValueError(f"rope_type={kind!r} must be default, linear or llama3.")
    except KeyError as missing:
        raise ValueError(f"rope_type={kind!r} needs the parameter {missing}.") from None
    return Rope(frequencies=tuple(frequency.tolist()))


def _llama3(frequency: np.ndarray, parameters: dict) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, others mixed."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / parameters["factor"])


def angles(rope: Rope, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, `f32[..., head_dim / 2]`, of positions `i32[...]`, not negative."""
    shape = (1,) * position.ndim + (len(rope.frequencies),)

    def turn(digits: int, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        angle = jnp.zeros(shape, jnp.float32)
        for power, step in enumerate(rope.steps[:digits]):
            digit = (position // DIGIT**power) % DIGIT
            angle = angle + digit[..., None].astype(jnp.float32) * step.reshape(shape)
        return jnp.cos(angle), jnp.sin(angle)

    # A branch for two reasons: most positions have two digits, and what leaves a branch is an
    # array. Left to itself XLA's CPU code works cosines out again for every layer and head.
    near = jnp.max(position) < DIGIT**2
    return jax.lax.cond(near, functools.partial(turn, 2), functools.partial(turn, DIGITS), position)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates channel pairs `(c, c + head_dim / 2)` of `x`, `[batch, tokens, heads, head_dim]`."""
    cos, sin = (a[:, :, None] for a in cos_sin)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
