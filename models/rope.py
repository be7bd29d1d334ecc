"""Rotary position embedding (RoFormer, arXiv:2104.09864) with the published frequency scalings.

A product `position * frequency` in float32 is off by 0.06 rad at position 10^6. We therefore split
the position into digits of base 256, and reduce the angle of one unit of each digit mod 2 pi
beforehand, in float64. This keeps angles within 1e-3 rad up to position 10^7.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from models.numbers import (
    MOST_HEAD_DIM,
    not_negative_number,
    positive_number,
    switch,
    whole_number,
)

DIGIT = 256
DIGITS = 4  # covers every int32 position
POSITIVE = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)
YARN_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor")  # null counts as missing
KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation of queries and keys in one kind of layer."""

    frequencies: tuple[float, ...]  # head_dim / 2 of them, in radians per token, fastest first
    scale: float = 1.0  # multiplies queries and keys, so scores twice (YaRN's temperature)

    @property
    def steps(self) -> np.ndarray:
        """`f32[digits, head_dim / 2]`: the angle of one unit of each digit, within +-pi."""
        step = np.outer(float(DIGIT) ** np.arange(DIGITS), np.asarray(self.frequencies))
        return (step - 2 * np.pi * np.round(step / (2 * np.pi))).astype(np.float32)


def make_rope(head_dim: int, parameters: dict) -> Rope:
    """Computes the frequencies from a checkpoint's `rope_parameters`.

    Args:
      head_dim: number of channels that are rotated, an even number.
      parameters: `rope_type`, `rope_theta`, and the parameters that the type needs. Types are
        "default", "linear", "llama3", "yarn", and "factors" (GGUF files), whose parameter
        "factors" lists a divisor per frequency.

    Raises:
      ValueError: the type is unknown, or a parameter is missing or out of range.
    """
    whole_number("head_dim", head_dim, most=MOST_HEAD_DIM)
    parameters = _checked(parameters, head_dim)
    kind = parameters.get("rope_type", "default")
    scale = 1.0
    try:
        theta = parameters["rope_theta"]
        frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if kind == "default":
            pass
        elif kind == "linear":
            frequency = frequency / parameters["factor"]
        elif kind == "llama3":
            frequency = _llama3(frequency, parameters)
        elif kind == "yarn":
            frequency = _yarn(frequency, theta, parameters)
            scale = _yarn_scale(parameters)
        elif kind == "factors":
            frequency = frequency / np.asarray(parameters["factors"])
        else:
            raise ValueError(f"rope_type={kind!r} must be one of {', '.join(KINDS)}.")
    except KeyError as missing:
        raise ValueError(f"rope_type={kind!r} needs the parameter {missing}.") from None
    return Rope(frequencies=tuple(frequency.tolist()), scale=scale)


def _checked(parameters: dict, head_dim: int) -> dict:
    """`parameters` with every number that is read here checked, and optional nulls left out."""
    checked = {k: v for k, v in parameters.items() if v is not None or k not in YARN_OPTIONAL}
    for name, value in checked.items():
        if name in POSITIVE:
            checked[name] = positive_number(name, value)
        elif name in ("mscale", "mscale_all_dim"):
            checked[name] = not_negative_number(name, 0 if value is None else value)
        elif name == "truncate":
            switch(name, value)
        elif name == "factors":
            if not isinstance(value, list) or len(value) != head_dim // 2:
                raise ValueError(f"factors must be a list of {head_dim // 2} numbers.")
            checked[name] = [positive_number("a factor", factor) for factor in value]
    return checked


def _llama3(frequency: np.ndarray, parameters: dict) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept; between is a mix."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if not low < high:
        raise ValueError(f"low_freq_factor={low} must be below high_freq_factor={high}.")
    turns = parameters["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / parameters["factor"])


def _yarn(frequency: np.ndarray, theta: float, parameters: dict) -> np.ndarray:
    """YaRN (arXiv:2309.00071): fast frequencies are kept, slow ones are divided by `factor`.

    Fast are channel pairs that turn more than `beta_fast` times in the original context, slow those
    that turn less than `beta_slow` times. In between the share of the two results changes linearly
    with the index of the pair. `truncate` rounds the ends of that range outward to whole indices.
    """
    pairs, factor = len(frequency), parameters["factor"]
    context = parameters["original_max_position_embeddings"]
    if not theta > 1:
        raise ValueError(f"rope_theta={theta} must be above 1 for YaRN.")

    def pair_of(turns: float) -> float:  # the fractional index of the pair with that many turns
        return pairs * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    low = pair_of(parameters.get("beta_fast", 32))
    high = pair_of(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high = high if high != low else low + 1e-3  # no division by 0, as in the published code
    stretched = np.clip((np.arange(pairs) - low) / (high - low), 0, 1)
    return frequency * (1 - stretched) + frequency / factor * stretched


def _yarn_scale(parameters: dict) -> float:
    """`attention_factor` if given, else the paper's `0.1 ln(factor) + 1`.

    DeepSeek's `mscale` and `mscale_all_dim` weigh the logarithm; the scale is then the quotient of
    the two results.
    """
    if (given := parameters.get("attention_factor")) is not None:
        return given
    temperature = lambda weight: 0.1 * weight * math.log(max(parameters["factor"], 1)) + 1
    weights = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return temperature(weights[0]) / temperature(weights[1]) if all(weights) else temperature(1)


def angles(rope: Rope, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, `f32[..., head_dim / 2]`, of the angles at positions `i32[...]`.

    Positions must not be negative. Both results are multiplied by `rope.scale`.
    """
    shape = (1,) * position.ndim + (len(rope.frequencies),)

    def turn(digits: int, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        angle = jnp.zeros(shape, jnp.float32)
        for power, step in enumerate(rope.steps[:digits]):
            digit = (position // DIGIT**power) % DIGIT
            angle = angle + digit[..., None].astype(jnp.float32) * step.reshape(shape)
        return rope.scale * jnp.cos(angle), rope.scale * jnp.sin(angle)

    # There are two reasons for the branch. Most positions have only two digits. And results of a
    # branch are stored as arrays: without it XLA's code for CPUs recomputes the cosines for every
    # layer and head.
    near = jnp.max(position) < DIGIT**2
    return jax.lax.cond(near, functools.partial(turn, 2), functools.partial(turn, DIGITS), position)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates channel pairs `(c, c + head_dim / 2)` of `x`, `[batch, tokens, heads, head_dim]`."""
    cos, sin = (a[:, :, None] for a in cos_sin)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
