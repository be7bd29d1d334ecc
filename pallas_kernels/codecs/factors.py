"""Per-token factors as stored: float16, or the 8 bits `ue5m3` that are a float16 cut short.

`ue5m3` is a non-negative float16 without its sign and its last seven mantissa bits: decoding is
one shift on every backend, the range is float16's, the relative error at most 1/16 (rms 2.5 %,
so 6e-4 of squared error beside 3.5e-2 of a 3-bit codebook).
"""

import jax
import jax.numpy as jnp
import numpy as np

FLOAT16_MAX = 65504.0
_UE5M3_MAX = 0xF7  # 61440; larger codes would be infinity or NaN
FACTOR_DTYPES = {"float16": jnp.dtype("float16"), "ue5m3": jnp.dtype("uint8")}


def store_factor(factor: jax.Array, kind: str = "float16") -> jax.Array:
    """Rounds finite float32 factors to their stored dtype, saturating instead of overflowing.

    Args:
      factor: `f32[...]`; not negative for "ue5m3".
      kind: "float16" or "ue5m3" (stored as uint8).
    """
    half = round_to_float16(factor).astype(jnp.float16)
    if kind == "float16":
        return half
    bits = jax.lax.bitcast_convert_type(half, jnp.uint16)
    return jnp.minimum((bits + np.uint16(64)) >> 7, np.uint16(_UE5M3_MAX)).astype(jnp.uint8)


def round_to_float16(x: jax.Array) -> jax.Array:
    """`f32` values rounded to float16's 11 bits, nearest and ties to even, saturating at its range.

    By bits: a compiler that may keep excess precision (XLA on GPUs) drops the rounding of a cast
    to float16 and back, and codes would be chosen against a factor that is not the stored one.
    Magnitudes below 2^-14, where float16 has fewer bits, keep theirs.
    """
    x = jnp.clip(x, -FLOAT16_MAX, FLOAT16_MAX)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> 13) & np.uint32(1)
    rounded = (bits + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)
    rounded = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.abs(x) < 2.0**-14, x, rounded)


def load_factor(stored: jax.Array) -> jax.Array:
    """Float32 value of stored factors, float16 or uint8 (`ue5m3`)."""
    if stored.dtype == jnp.uint8:
        bits = stored.astype(jnp.uint16) << 7
        stored = jax.lax.bitcast_convert_type(bits, jnp.float16)
    return stored.astype(jnp.float32)
