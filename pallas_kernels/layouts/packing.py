"""Packs codes into words: pure functions, each with an exact inverse.

In planes, field p of word c holds dim `p * words + c`, so unpacking a field of all words yields
consecutive dims and nothing has to be permuted; 3-bit codes are a 2-bit and a 1-bit array. In runs,
word r holds the consecutive dims from `r * fields` on, the order in which a TPU widens int4. Both
pack the last axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

WORDS = {8: jnp.dtype("uint8"), 16: jnp.dtype("uint16"), 32: jnp.dtype("uint32")}
# Bits of a code to the widths of the arrays that store it, the code's low bits first.
PARTS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def check_packable(head_dim: int, bits: int, word_bits: int) -> None:
    """Raises ValueError unless the codes of one vector fill whole words."""
    if bits not in PARTS:
        raise ValueError(f"{bits=} must be one of {tuple(PARTS)}.")
    if word_bits not in WORDS:
        raise ValueError(f"{word_bits=} must be one of {tuple(WORDS)}.")
    for width in PARTS[bits]:
        if head_dim * width % word_bits:
            raise ValueError(
                f"{head_dim=} must be a multiple of {word_bits // width} for {bits}-bit codes in "
                f"{word_bits}-bit words."
            )


def pack_planes(codes: jax.Array, bits: int, word_bits: int = 8) -> tuple[jax.Array, ...]:
    """Packs codes into words, one array `[..., head_dim * width / word_bits]` per width in `PARTS`.

    Args:
      codes: `u8[..., head_dim]`, below `2^bits`.
      bits: 2, 3, 4 or 8.
      word_bits: 8 (plain XLA), 16 or 32 (GPU).
    """
    return _pack(codes, bits, word_bits, fields_axis=-2)


def unpack_planes(words: tuple[jax.Array, ...], bits: int, dims_axis: int = -1) -> jax.Array:
    """Inverse of `pack_planes`: codes `u8[..., head_dim]`.

    Args:
      words: as `pack_planes` gives them, or with their last axis moved to `dims_axis`.
      bits: 2, 3, 4 or 8.
      dims_axis: -1 or -2, the axis of words in `words` and of head_dim in the result.
    """
    return _unpack(words, bits, fields_axis=dims_axis - 1)


def pack_runs(codes: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """Like `pack_planes` with uint32 words of consecutive dims; nibbles hold `code - 8`."""
    codes = codes ^ np.uint8(8) if bits == 4 else codes  # two's complement of code - 8
    return _pack(codes, bits, 32, fields_axis=-1)


def unpack_runs(words: tuple[jax.Array, ...], bits: int) -> jax.Array:
    """Inverse of `pack_runs`: codes `u8[..., head_dim]`."""
    codes = _unpack(words, bits, fields_axis=-1)
    return codes ^ np.uint8(8) if bits == 4 else codes


def pack_float16_pairs(low: jax.Array, high: jax.Array | None = None) -> jax.Array:
    """Packs a float16 (or uint8) into each half of `u32[...]`; `high=None` leaves zero bits."""
    word = _half_bits(low)
    return word if high is None else word | _half_bits(high) << 16


def unpack_float16_pairs(words: jax.Array, low_dtype, high_dtype=None) -> tuple[jax.Array, ...]:
    """Inverse of `pack_float16_pairs`, low half first; one array if `high_dtype` is None."""
    low = _from_half_bits(words & np.uint32(0xFFFF), low_dtype)
    return (low,) if high_dtype is None else (low, _from_half_bits(words >> 16, high_dtype))


def pack_pair(low: jax.Array, high: jax.Array) -> jax.Array:
    """Packs pairs of values of one dtype, float16 or uint8, into words of twice the width."""
    bits = 8 * low.dtype.itemsize
    word = lambda x: jax.lax.bitcast_convert_type(x, WORDS[bits]).astype(WORDS[2 * bits])
    return word(low) | word(high) << bits


def unpack_pair(words: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Inverse of `pack_pair`: `(low, high)`."""
    bits = 8 * jnp.dtype(dtype).itemsize
    value = lambda x: jax.lax.bitcast_convert_type(x.astype(WORDS[bits]), dtype)
    return value(words), value(words >> bits)  # astype keeps the low bits


def _pack(codes, bits, word_bits, fields_axis):
    head_dim = codes.shape[-1]
    check_packable(head_dim, bits, word_bits)
    parts, shift = [], 0
    for width in PARTS[bits]:
        fields = word_bits // width
        part = (codes >> shift) & np.uint8(2**width - 1)
        shift += width
        part = part.astype(WORDS[word_bits]).reshape(
            codes.shape[:-1] + _split(fields, -1, fields_axis)
        )
        words = part << _field_shifts(part.ndim, fields, width, fields_axis, word_bits)
        # Fields do not overlap: a sum is an or, and stays within the word.
        parts.append(jnp.sum(words, axis=fields_axis, dtype=words.dtype))
    return tuple(parts)


def _unpack(words, bits, fields_axis):
    if len(words) != len(PARTS[bits]):
        raise ValueError(
            f"{bits}-bit codes have {len(PARTS[bits])} arrays of words, not {len(words)}."
        )
    parts, shift = [], 0
    for word, width in zip(words, PARTS[bits], strict=True):
        word_bits = word.dtype.itemsize * 8
        fields = word_bits // width
        shifts = np.arange(fields, dtype=word.dtype) * word.dtype.type(width)
        shape = [1] * (word.ndim + 1)
        shape[fields_axis] = fields
        part = jnp.expand_dims(word, fields_axis) >> shifts.reshape(shape)
        part = (part & word.dtype.type(2**width - 1)).astype(jnp.uint8)
        merged = list(word.shape)
        merged[fields_axis + 1 if fields_axis < -1 else -1] *= fields
        part = part.reshape(merged) << shift
        parts.append(part)
        shift += width
    return functools.reduce(jnp.bitwise_or, parts)


def _split(fields, words, fields_axis):
    return (fields, words) if fields_axis == -2 else (words, fields)


def _field_shifts(ndim, fields, width, fields_axis, word_bits):
    shifts = np.arange(fields, dtype=WORDS[word_bits]) * WORDS[word_bits].type(width)
    return shifts.reshape((1,) * (ndim - 2) + _split(fields, 1, fields_axis))


def _half_bits(x):
    bits = x if x.dtype == jnp.uint8 else jax.lax.bitcast_convert_type(x, jnp.uint16)
    return bits.astype(jnp.uint32)


def _from_half_bits(bits, dtype):
    if jnp.dtype(dtype) == jnp.uint8:
        return bits.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), dtype)
