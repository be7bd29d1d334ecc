"""MXFP4 weights: 4-bit floats in blocks of 32 that share a power of two.

The format is that of the OCP Microscaling Formats (MX) specification 1.0. As in gpt-oss's published
checkpoints a byte holds two values, the earlier one in the low nibble.
"""

import jax
import jax.numpy as jnp

BLOCK = 32  # number of values that share a scale
BLOCK_BYTES = BLOCK // 2
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0-7; codes 8-15 are the negatives


def dequantize(blocks: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """Unpacks `[..., blocks, 16]` bytes to `[..., blocks * 32]` values, `e2m1 * 2**(scale - 127)`.

    The result is exact in bfloat16 and float32, except that XLA flushes subnormal numbers: values
    below `2**-126`, and all values of a block with scale 0, become 0.

    Args:
      blocks: `u8[..., blocks, 16]`, two values per byte.
      scales: `u8[..., blocks]`, exponents in the format E8M0; 255 is NaN.
      dtype: of the result.
    """
    table = jnp.array([*E2M1, *(-value for value in E2M1)], jnp.float32)
    values = table[jnp.stack([blocks & 15, blocks >> 4], axis=-1)]
    values = values * _e8m0(scales)[..., None, None]
    return values.astype(dtype).reshape(*blocks.shape[:-2], -1)


def multiply(blocks: jax.Array, scales: jax.Array, x: jax.Array) -> jax.Array:
    """`dequantize(blocks, scales) @ x`, summed in float32; weights below `2**-112` count as 0.

    Low nibbles are multiplied by the even rows of `x`, high nibbles by the odd rows. Interleaving
    the weights instead, as `dequantize` does, takes a CPU ten times as long as the product.

    Args:
      blocks: `u8[rows, blocks, 16]`.
      scales: `u8[rows, blocks]`.
      x: `[blocks * 32, columns]`; weights are cast to its dtype.

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

    A code has a sign, an exponent and a mantissa. Moved to the places of these fields in a float16,
    all in its high byte, they give a float16 of `2**-14` times the code's value; this holds for
    subnormal values, too. A CPU vectorises it, whereas it looks values up one by one.
    """
    high = (codes & 0x80) | (codes >> 3 & 0x0E)
    bits = high.astype(jnp.uint16) << 8
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _e8m0(scales: jax.Array) -> jax.Array:
    """`2**(scale - 127)` in float32, NaN for 255 and 0 for 0."""
    bits = scales.astype(jnp.uint32) << 23  # a float32's exponent field has the same bias
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(scales == 255, jnp.float32(jnp.nan), power)
