"""Codecs without a rotation: min-max uniform, symmetric int8, and plain float8 casts."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs.codec import Quantized, TensorCodec, finite_input
from pallas_kernels.codecs.factors import FACTOR_DTYPES, FLOAT16_MAX, load_factor, store_factor


@dataclass(frozen=True)
class MinMax(TensorCodec):
    """Uniform levels from each vector's minimum to its maximum; the published value codec.

    `x = scale * code + zero` with `scale = (max - min) / (2^bits - 1)` and `zero = min`, both
    stored as float16. Codes are chosen for the stored factors, so that the factors' rounding does
    not add to the error.
    """

    always_finite: ClassVar[bool] = True

    bits: int = 4  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self):
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits={self.bits} must be 2, 3, 4 or 8.")

    @property
    def factor_dtypes(self) -> tuple[jnp.dtype, ...]:
        return (FACTOR_DTYPES["float16"],) * 2

    def quantize(self, x: jax.Array, mean: jax.Array | None = None) -> Quantized:
        x = jnp.clip(finite_input(x, mean), -FLOAT16_MAX, FLOAT16_MAX)
        low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)
        top = 2**self.bits - 1
        factors = store_factor((high - low) / np.float32(top)), store_factor(low)
        scale, zero = (load_factor(factor)[..., None] for factor in factors)
        codes = jnp.where(scale > 0, (x - zero) / jnp.where(scale > 0, scale, 1), 0)
        return Quantized(jnp.clip(_nearest(codes), 0, top).astype(jnp.uint8), factors)


@dataclass(frozen=True)
class Int8(TensorCodec):
    """Symmetric int8 per token and head: `x = scale * code`, `scale = max |x| / 127`, float16."""

    always_finite: ClassVar[bool] = True

    @property
    def bits(self) -> int:
        return 8

    @property
    def codes_dtype(self) -> jnp.dtype:
        return jnp.dtype("int8")

    @property
    def factor_dtypes(self) -> tuple[jnp.dtype, ...]:
        return (FACTOR_DTYPES["float16"],)

    def quantize(self, x: jax.Array, mean: jax.Array | None = None) -> Quantized:
        x = finite_input(x, mean)
        stored = store_factor(jnp.max(jnp.abs(x), axis=-1) / 127)
        scale = load_factor(stored)[..., None]
        codes = jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1), 0)
        return Quantized(jnp.clip(_nearest(codes), -127, 127).astype(jnp.int8), (stored,))


@dataclass(frozen=True)
class Float8(TensorCodec):
    """An unscaled cast that saturates (e4m3 at 448, e5m2 at 57344): never NaN, never infinite."""

    always_finite: ClassVar[bool] = True

    format: Literal["e4m3", "e5m2"] = "e4m3"

    def __post_init__(self):
        if self.format not in ("e4m3", "e5m2"):
            raise ValueError(f"format={self.format!r} must be 'e4m3' or 'e5m2'.")

    @property
    def bits(self) -> int:
        return 8

    @property
    def codes_dtype(self) -> jnp.dtype:
        return jnp.dtype({"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}[self.format])

    def quantize(self, x: jax.Array, mean: jax.Array | None = None) -> Quantized:
        limit = np.float32(jnp.finfo(self.codes_dtype).max)
        return Quantized(
            jnp.clip(finite_input(x, mean), -limit, limit).astype(self.codes_dtype), ()
        )


def _nearest(x: jax.Array) -> jax.Array:
    """Nearest whole number, halves rounded up; Pallas's Triton kernels have no `round`."""
    return jnp.floor(x + 0.5)
