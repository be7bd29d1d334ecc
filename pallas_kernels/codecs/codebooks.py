"""Scalar codebooks for N(0, 1): exact Lloyd-Max tables and odd polynomials of the centred code.

A polynomial needs no table lookup on any backend: with `t = code - (2^bits - 1) / 2` the level is
`a t + b t^3 (+ c t^5)`. Encoding always rounds to the nearest of the codebook's own levels.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

# Coefficients of t, t^3, ... of least MSE for unit variance, by number of bits (docs/design.md,
# Codecs).
CUBIC = {2: (0.892887, 0.0506925), 3: (0.471455, 0.0115849), 4: (0.240507, 0.00209753)}
QUINTIC = {4: (0.262655, 1.29166e-4, 2.95824e-5)}


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """`2^bits` levels, ascending and odd-symmetric; hashable, so it can be a static argument.

    `polynomial` holds the coefficients of t, t^3, ...; empty means that `levels` is a table.
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    polynomial: tuple[float, ...] = ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Midpoints between neighbouring levels: the decision bounds of `encode`."""
        return tuple((a + b) / 2 for a, b in zip(self.levels[:-1], self.levels[1:], strict=True))

    def encode(self, x: jax.Array) -> jax.Array:
        """Index of the nearest level, `u8[...]`; NaN gives the level next to zero."""
        half = len(self.levels) // 2
        magnitude = jnp.abs(x.astype(jnp.float32))
        steps = [(magnitude > np.float32(t)).astype(jnp.uint8) for t in self.thresholds[half:]]
        steps = functools.reduce(jnp.add, steps)
        return jnp.where(x < 0, np.uint8(half - 1) - steps, np.uint8(half) + steps)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Levels of the codes, `f32[...]`."""
        t = codes.astype(jnp.float32) - np.float32((len(self.levels) - 1) / 2)
        if self.polynomial:
            square = t * t
            value = np.float32(self.polynomial[-1])
            for coefficient in self.polynomial[-2::-1]:
                value = value * square + np.float32(coefficient)
            return t * value
        half = len(self.levels) // 2
        magnitude, value = jnp.abs(t), jnp.full(t.shape, np.float32(self.levels[half]))
        for i, level in enumerate(
            self.levels[half + 1 :]
        ):  # selects: several times a gather's speed
            value = jnp.where(magnitude > i + 1, np.float32(level), value)
        return jnp.where(t < 0, -value, value)


@functools.cache
def get_codebook(name: str, bits: int) -> Codebook:
    """A codebook by name: "cubic" and "lloyd_max" for 2 to 4 bits, "quintic" for 4.

    Raises:
      ValueError: no such codebook.
    """
    if name == "lloyd_max" and bits in CUBIC:
        return Codebook(name=name, bits=bits, levels=_lloyd_max_levels(bits))
    polynomials = {"cubic": CUBIC, "quintic": QUINTIC}.get(name, {})
    if bits not in polynomials:
        raise ValueError(f"{name=}, {bits=}: no such codebook; 'cubic' and 'lloyd_max' have 2, 3 "
                         "and 4 bits, 'quintic' 4.")  # fmt: skip
    count = 2**bits
    ts = [code - (count - 1) / 2 for code in range(count)]
    levels = tuple(sum(c * t ** (2 * i + 1) for i, c in enumerate(polynomials[bits])) for t in ts)
    return Codebook(name=name, bits=bits, levels=levels, polynomial=polynomials[bits])


def gaussian_mse(codebook: Codebook) -> float:
    """Mean squared error of quantizing N(0, 1), exact up to float64 rounding."""
    error = 0.0
    edges = (-math.inf, *codebook.thresholds, math.inf)
    for level, low, high in zip(codebook.levels, edges[:-1], edges[1:], strict=True):
        mass, first, second = _moments(low, high)
        error += second - 2 * level * first + level * level * mass
    return error


def _lloyd_max_levels(bits: int, iterations: int = 100_000) -> tuple[float, ...]:
    """Lloyd-Max levels: iterates "level = mean of its cell, threshold = midpoint of levels"."""
    levels = [(i + 0.5) * 4 / 2**bits for i in range(2 ** (bits - 1))]
    for _ in range(iterations):
        edges = [
            0.0,
            *((a + b) / 2 for a, b in zip(levels[:-1], levels[1:], strict=True)),
            math.inf,
        ]
        cells = [_moments(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        previous, levels = levels, [first / mass for mass, first, _ in cells]
        if max(abs(a - b) for a, b in zip(previous, levels, strict=True)) < 1e-14:
            break
    return (*(-level for level in reversed(levels)), *levels)


def _moments(low: float, high: float) -> tuple[float, float, float]:
    """Integrals of pdf, x pdf and x^2 pdf of N(0, 1) over [low, high]."""
    cdf = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))
    pdf = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    edge = lambda x: 0.0 if math.isinf(x) else x * pdf(x)
    mass = cdf(high) - cdf(low)
    return mass, pdf(low) - pdf(high), mass + edge(low) - edge(high)
