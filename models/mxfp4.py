"""MXFP4 weights: 4-bit floats in blocks of 32 that share a power of two.

The format is that of the OCP Microscaling Formats (MX) specification 1.0; two values to a byte, low
nibble first, is how gpt-oss's published checkpoints pack them.
"""

import jax
import jax.numpy as jnp

BLOCK = 32  # values that share a scale
BLOCK_BYTES = BLOCK // 2
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; codes 8-15 are the negatives


def dequantize(blocks: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """Unpacks `[..., blocks, 16]` bytes to `[..., blocks * 32]` values, `e2m1 * 2**(scale - 127)`.

    Exact in bfloat16 and float32, but that XLA flushes subnormal numbers: what is below `2**-126`,
    and all of a block with scale 0, reads as 0.

    Args:
      blocks: `u8[..., blocks, 16]`, two values a byte, the earlier in the low nibble.
      scales: `u8[..., blocks]`, E8M0; 255 is NaN.
      dtype: of the result.
    """
    table = jnp.array([*E2M1, *(-value for value in E2M1)], jnp.float32)
    values = table[jnp.stack([blocks & 15, blocks >> 4], axis=-1)]
    values = values * _e8m0(scales)[..., None, None]
    return values.astype(dtype).reshape(*blocks.shape[:-2], -1)


def multiply(blocks: jax.Array, scales: jax.Array, x: jax.Array) -> jax.Array:
    """`dequantize(blocks, scales) @ x`, summed in float32; weights below `2**-112` count as 0.

    Low and high nibbles multiply the even and the odd rows of `x`: to interleave them, as
    `dequantize` does, takes a CPU ten times as long as the product.

    Args:
      blocks: `u8[rows, blocks, 16]`.
      scales: `u8[rows, blocks]`.
      x: `[blocks * 32, columns]`; its dtype is that in which weights are multiplied.

    Returns:
      `f32[rows, columns]`.
    """
    powers = _e8m0(scales)[..., None]

    def dot(codes, x):
        weights = (_small_e2m1(codes) * powers).astype(x.dtype).reshape(codes.shape[0], -1)
        return jnp.dot(weights, x, preferred_element_type=jnp.float32)

    return (dot(blocks << 4, x[0::2]) + dot(blocks, x[1::2])) * 2.0**14


def _small_e2m1(codes: jax.Array) -> jax.Array:
    """Values of the codes in the high nibbles of bytes, times `2**-14`, in float32.

    A code is a short float16: with its sign, exponent and mantissa moved to that format's places
    (all in the high byte) it reads `2**-14` of its value, subnormals included. This vectorises; a
    lookup goes value by value on a CPU.
    """
    high = (codes & 0x80) | (codes >> 3 & 0x0E)
    bits = high.astype(jnp.uint16) << 8
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _e8m0(scales: jax.Array) -> jax.Array:
    """`2**(scale - 127)` in float32, NaN for 255 and 0 for 0."""
    bits = scales.astype(jnp.uint32) << 23  # a float32's exponent field has the same bias
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(scales == 255, jnp.float32(jnp.nan), power)
