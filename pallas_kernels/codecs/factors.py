"""How per-token factors are stored: as float16, or in 8 bits as `ue5m3`, a truncated float16.

`ue5m3` is a non-negative float16 without its sign and its last seven mantissa bits. Decoding is one
shift on every backend and the range is float16's. The relative error is at most 1/16 and 2.5 % rms:
a squared error of 6e-4, beside the 3.5e-2 of a 3-bit codebook.
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
    """Rounds `f32` values to float16's 11 bits (nearest, ties to even), saturating at its range.

    This works on the bits, because a compiler that may keep excess precision (XLA on GPUs) drops
    the rounding of a cast to float16 and back; codes would then be chosen for a factor that is not
    the stored one. Magnitudes below 2^-14, where float16 has fewer bits, are not rounded.
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
