"""MXFP4 weights: 4-bit floats in blocks of 32 that share a power of two.

The format is that of the OCP Microscaling Formats (MX) specification 1.0; packing two values to a
byte, low nibble first, is that of gpt-oss's published checkpoints.
"""

import jax
import jax.numpy as jnp

BLOCK = 32  # values that share a scale
BLOCK_BYTES = BLOCK // 2


def dequantize(blocks: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """Unpacks `[..., blocks, 16]` bytes to `[..., blocks * 32]` values, `e2m1 * 2**(scale - 127)`.

    Exact in bfloat16 and float32, except that XLA flushes subnormal numbers: scale 0, `2**-127`,
    reads as 0.

    Args:
      blocks: `u8[..., blocks, 16]`, two values a byte, the earlier in the low nibble.
      scales: `u8[..., blocks]`, E8M0; 255 is NaN.
      dtype: of the result, bfloat16 or float32.
    """
    values = jnp.stack([e2m1(blocks & 15, dtype), e2m1(blocks >> 4, dtype)], axis=-1)
    values = values * e8m0(scales, dtype)[..., None, None]
    return values.reshape(*blocks.shape[:-2], -1)


def e2m1(codes: jax.Array, dtype) -> jax.Array:
    """Values 0, 0.5, 1, 1.5, 2, 3, 4, 6 of the codes 0-7, and their negatives of 8-15.

    By arithmetic, which vectorises where a lookup would go element by element: twice the magnitude
    is `0 1 2 3 4 6 8 12`, the code itself up to 4.
    """
    magnitude = codes & 7
    twice = magnitude + (jnp.maximum(magnitude, 4) - 4) + ((magnitude + 1) >> 2 & 2)
    twice = jnp.where(codes > 7, -twice.astype(jnp.int8), twice.astype(jnp.int8))
    return twice.astype(dtype) * jnp.asarray(0.5, dtype)


def e8m0(scales: jax.Array, dtype) -> jax.Array:
    """Powers of two, `2**(scale - 127)`; 255 is NaN and 0 is flushed to 0."""
    bits = scales.astype(jnp.uint32) << 23  # the exponent field of a float32 has the same bias
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    nan = jnp.float32(jnp.nan)
    return jnp.where(scales == 255, nan, power).astype(dtype)
