"""Levels of packed codes as the kernel computes them: polynomials, tables, factors.

The kernel computes a codebook's levels by an odd polynomial of the centred code, or looks them up
in a table of 8 values: all levels of 3 bits, or the positive levels of 4 bits where the polynomial
would have degree 9. Uniform codes are their own levels: their bits are read as float16 subnormals.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs.codebooks import Codebook
from pallas_kernels.codecs.codec import TensorCodec
from pallas_kernels.codecs.factors import load_factor
from pallas_kernels.codecs.turboquant import TurboQuant

# Odd polynomial of t = (code - 7.5) / 8 through the 16 Lloyd-Max levels; largest error 2.2e-4.
LLOYD_MAX_4BIT = (2.0558169, 0.4017481, 0.7171981, -0.9974933, 1.0537972)


@dataclasses.dataclass(frozen=True)
class Levels:
    """How a code's level is computed; `gain` is multiplied later, once for all levels.

    `coefficients` are those of t, t^3, ..., with `t = (code - centre) * step`. If there are none,
    the level is the code itself, times a power of two that `PlanesReader.gains` undoes.
    """

    bits: int
    coefficients: tuple[float, ...] = ()
    step: float = 1.0
    gain: float = 1.0
    # 8 values that are looked up instead: all levels of 3 bits, the positive half of 4 bits.
    table: tuple[float, ...] = ()

    @property
    def centre(self) -> float:
        return (2**self.bits - 1) / 2


def make_levels(codec: TensorCodec, lookup: bool = True) -> Levels:
    """Levels of a codec with packed codes; `lookup` allows a table instead of a polynomial.

    Raises:
      NotImplementedError: a codebook that no short polynomial passes through.
    """
    if not isinstance(codec, TurboQuant):
        return Levels(codec.bits)
    codebook = codec.levels
    if len(codebook.polynomial) == 2:
        return _cubic_levels(codebook, lookup)
    half = 2 ** (codebook.bits - 1)
    step = 1 / half
    if codebook.polynomial:
        scaled = [c / step ** (2 * i + 1) for i, c in enumerate(codebook.polynomial)]
        return Levels(codebook.bits, tuple(scaled), step)
    positive = codebook.levels[half:]
    if codebook.bits == 4 and codebook.name == "lloyd_max":
        return Levels(4, LLOYD_MAX_4BIT, step, table=tuple(positive) if lookup else ())
    if codebook.bits > 3:
        raise NotImplementedError(
            f"codebook={codebook.name!r}, bits={codebook.bits}: no short polynomial."
        )
    t = (np.arange(half) + 0.5) * step
    powers = t[:, None] ** (2 * np.arange(half)[None] + 1)
    solved = np.linalg.solve(powers, np.asarray(positive))
    table = tuple(map(float, codebook.levels)) if lookup and codebook.bits == 3 else ()
    return Levels(codebook.bits, tuple(map(float, solved)), step, table=table)


def check_known(codec: TensorCodec) -> None:
    """Raises NotImplementedError unless the kernel computes what `codec` does when it is read.

    It knows codes that are their own levels, TurboQuant's codebooks, and factors as they are
    stored; it never calls the codec's own methods.
    """
    kind, known = type(codec), (TensorCodec, TurboQuant)
    for name in ("code_values", "factor_values"):
        if getattr(kind, name) not in [getattr(base, name) for base in known]:
            raise NotImplementedError(
                f"{kind.__name__}.{name}: the GPU kernel reads codes that are their own levels, "
                "TurboQuant's codebooks, and factors as they are stored."
            )


def _cubic_levels(codebook: Codebook, lookup: bool) -> Levels:
    """Levels `b step^-3 (t^3 + c t)`: the leading factor becomes the gain, to save a product."""
    bits, (a, b) = codebook.bits, codebook.polynomial
    step = {2: 0.25, 3: 0.125, 4: 1 / 32}[bits]
    gain = b / step**3
    table = ()
    if lookup and bits == 3:
        table = tuple(map(float, np.asarray(codebook.levels) / gain))
    return Levels(bits, (a / step / gain, 1.0), step, gain, table)


def level_values(levels: Levels, code: jax.Array, bytes_are: str) -> jax.Array:
    """Levels of codes, float16: the PTX's arithmetic in plain JAX, each step rounded.

    Args:
      levels: how levels follow from codes.
      code: `i32`, unpacked; for signed bytes `code + 128`.
      bytes_are: the dtype of 8-bit codes, see `readers.PlanesReader`.
    """
    if bytes_are.startswith("float8"):
        code = jax.lax.bitcast_convert_type(code.astype(jnp.uint8), bytes_are)
        return code.astype(jnp.float16)
    code = code.astype(jnp.float32)
    if not levels.coefficients:
        return (code - (128 if bytes_are == "int8" else 0)).astype(jnp.float16)
    if levels.table:
        index = jnp.abs(code - 7.5) - 0.5 if levels.bits == 4 else code
        value = jnp.zeros_like(code)
        for i, level in enumerate(levels.table):
            value = jnp.where(index == i, level, value)
        negative = (code < 8) & (levels.bits == 4)
        return jnp.where(negative, -value, value).astype(jnp.float16)
    half = lambda x: x.astype(jnp.float16).astype(jnp.float32)
    t = half((code - levels.centre) * levels.step)
    *rest, value = (float(np.float16(c)) for c in levels.coefficients)
    value, square = jnp.full_like(t, value), t * t
    for i, coefficient in enumerate(reversed(rest)):
        first = i == 0 and levels.coefficients[-1] == 1.0
        value = half((square if first else value * half(square)) + coefficient)
    return (value * t).astype(jnp.float16)


def factor_value(stored: jax.Array, half: int | None = None) -> jax.Array:
    """Float32 value of a stored factor, float16 or uint8 (`ue5m3`, a truncated float16).

    `half` picks the low (0) or high (1) half of words that hold two factors.
    """
    if half is not None:
        bits = 4 * stored.dtype.itemsize
        stored = (stored >> np.asarray(bits * half, stored.dtype)).astype(f"uint{bits}")
        if bits == 16:
            stored = jax.lax.bitcast_convert_type(stored, jnp.float16)
    return load_factor(stored)
