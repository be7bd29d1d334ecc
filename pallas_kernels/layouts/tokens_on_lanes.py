"""Page layout for TPUs: one lane per token, so that no dimension is padded to 128 lanes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs.codec import Exact, Quantized, TensorCodec
from pallas_kernels.layouts.packing import (
    PARTS,
    check_packable,
    pack_float16_pairs,
    pack_runs,
    unpack_float16_pairs,
    unpack_runs,
)
from pallas_kernels.layouts.page_layout import Arrays, PageLayout

LANES = 128
_SUBLANES = 8  # rows of a 32-bit tile


@dataclass(frozen=True, kw_only=True)
class TokensOnLanes(PageLayout):
    """One lane per token: pages have 128 tokens, and all heads of a page are contiguous.

    Arrays:
      codes: `u32[rows, 128]`. Each head has rows of key words, then rows of value words, packed by
        `packing.pack_runs`: word r of 4-bit codes holds dims 8r to 8r+7 as `code - 8`; 3-bit codes
        are all 2-bit words, then all 1-bit words; a word holds four 8-bit codes. An exact codec
        keeps its own dtype and has one row per dim, the key's first.
      meta: `u32[rows, 128]`. Each head has a row with the key's scale in the low half and the
        value's in the high half, then, if a codec has zeros, a row of them, the key's first.

    Zero rows at the end pad the number of rows to what the TPU allocates (`tile_rows`).
    """

    page_size: int = LANES

    def __post_init__(self):
        if self.page_size != LANES:
            raise ValueError(f"page_size={self.page_size} must be {LANES}: a lane a token.")
        key, value = self.codec.key, self.codec.value
        if key != value and (isinstance(key, Exact) or isinstance(value, Exact)):
            raise ValueError(f"{self.codec.name} pairs an exact tensor with another kind.")
        if not isinstance(key, Exact):
            for tensor in (key, value):
                check_packable(self.head_dim, tensor.bits, 32)

    def arrays(self, kv_heads: int) -> dict[str, jax.ShapeDtypeStruct]:
        exact = isinstance(self.codec.key, Exact)
        dtype = self.codec.key.codes_dtype if exact else jnp.dtype("uint32")
        rows = kv_heads * sum(self._code_rows)
        arrays = {"codes": jax.ShapeDtypeStruct((tile_rows(rows, dtype), LANES), dtype)}
        if self._meta_rows:
            rows = tile_rows(kv_heads * self._meta_rows, jnp.dtype("uint32"))
            arrays["meta"] = jax.ShapeDtypeStruct((rows, LANES), jnp.dtype("uint32"))
        return arrays

    def kv_heads(self, arrays: Arrays) -> int:
        # Division drops the padding: `check_waste` keeps it below the rows of one head.
        return arrays["codes"].shape[-2] // sum(self._code_rows)

    @property
    def head_axes(self) -> dict[str, int]:
        return dict.fromkeys(self.arrays(1), -2)  # whole heads of rows

    @property
    def token_axes(self) -> dict[str, int]:
        return dict.fromkeys(self.arrays(1), -1)

    def pack(self, key: Quantized, value: Quantized) -> Arrays:
        rows = jnp.concatenate(
            [_words(self.codec.key, key.codes), _words(self.codec.value, value.codes)], axis=-1
        )  # [..., kv_heads, tokens, rows of a head]
        shapes = self.arrays(rows.shape[-3])
        shape = shapes["codes"]
        rows_first = self._rows_first(rows, shape.shape[0])
        arrays = {"codes": jax.lax.bitcast_convert_type(rows_first, shape.dtype)}
        if self._meta_rows:
            none = jnp.zeros(rows.shape[:-1], jnp.float16)
            meta = [
                pack_float16_pairs(*(r.factors[0] if r.factors else none for r in (key, value)))
            ]
            zeros = [*key.factors[1:], *value.factors[1:]]
            meta += [pack_float16_pairs(*zeros)] if zeros else []
            arrays["meta"] = self._rows_first(jnp.stack(meta, -1), shapes["meta"].shape[0])
        return arrays

    def unpack(self, arrays: Arrays) -> tuple[Quantized, Quantized]:
        key, value = self.codec.key, self.codec.value
        codes = arrays["codes"]
        codes = jax.lax.bitcast_convert_type(codes, _integer(codes.dtype))
        kv_heads = self.kv_heads(arrays)
        rows = self._rows_last(codes, sum(self._code_rows), kv_heads)
        key_rows, value_rows = jnp.split(rows, [self._code_rows[0]], axis=-1)
        key_factors, value_factors = (), ()
        if self._meta_rows:
            meta = self._rows_last(arrays["meta"], self._meta_rows, kv_heads)
            low, high = ([*t.factor_dtypes, jnp.dtype("float16")][0] for t in (key, value))
            low, high = unpack_float16_pairs(meta[..., 0], low, high)
            key_factors = (low,) if key.factor_dtypes else ()
            value_factors = (high,) if value.factor_dtypes else ()
            if dtypes := [*key.factor_dtypes[1:], *value.factor_dtypes[1:]]:
                zeros = unpack_float16_pairs(meta[..., 1], *dtypes)
                more = len(key.factor_dtypes[1:])
                key_factors, value_factors = (
                    key_factors + zeros[:more],
                    value_factors + zeros[more:],
                )
        return (
            Quantized(_codes(key, key_rows), key_factors),
            Quantized(_codes(value, value_rows), value_factors),
        )

    @property
    def _code_rows(self) -> tuple[int, int]:
        """Rows of one head's key codes and of its value codes."""
        key, value = self.codec.key, self.codec.value
        if isinstance(key, Exact):
            return self.head_dim, self.head_dim
        return key.bits * self.head_dim // 32, value.bits * self.head_dim // 32

    @property
    def _meta_rows(self) -> int:
        return max(len(self.codec.key.factor_dtypes), len(self.codec.value.factor_dtypes))

    def _rows_first(self, rows, padded):
        """`[..., kv_heads, tokens, r]` to `[..., padded, tokens]`."""
        rows = jnp.swapaxes(rows, -1, -2)
        rows = rows.reshape(*rows.shape[:-3], rows.shape[-3] * rows.shape[-2], rows.shape[-1])
        pad = [(0, 0)] * (rows.ndim - 2) + [(0, padded - rows.shape[-2]), (0, 0)]
        return jnp.pad(rows, pad)

    def _rows_last(self, rows, per_head, kv_heads):
        """Inverse of `_rows_first`."""
        rows = rows[..., : kv_heads * per_head, :]
        rows = rows.reshape(*rows.shape[:-2], kv_heads, per_head, rows.shape[-1])
        return jnp.swapaxes(rows, -1, -2)


def tile_rows(rows: int, dtype: jnp.dtype) -> int:
    """Rows that a TPU allocates for `rows`: whole tiles, or a power of two below one tile.

    A tile has 8 rows of 32-bit values, 16 rows of 16-bit values.
    """
    tile = _SUBLANES * 4 // dtype.itemsize
    small = 4 // dtype.itemsize  # fewer rows than this share a sublane
    if rows < tile:
        return max(small, 1 << (rows - 1).bit_length())
    return -(-rows // tile) * tile


def _words(tensor: TensorCodec, codes: jax.Array) -> jax.Array:
    """Words of vectors' codes, `[..., rows]`."""
    if isinstance(tensor, Exact):  # as integers, because copying floats may change a NaN's bits
        return jax.lax.bitcast_convert_type(codes, _integer(codes.dtype))
    if codes.dtype != jnp.uint8:
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return jnp.concatenate(pack_runs(codes, tensor.bits), axis=-1)


def _codes(tensor: TensorCodec, rows: jax.Array) -> jax.Array:
    """Inverse of `_words`."""
    if isinstance(tensor, Exact):
        return jax.lax.bitcast_convert_type(rows, tensor.codes_dtype)
    sizes = np.cumsum([rows.shape[-1] * width // tensor.bits for width in PARTS[tensor.bits]])
    codes = unpack_runs(tuple(jnp.split(rows, sizes[:-1].tolist(), axis=-1)), tensor.bits)
    if tensor.codes_dtype == jnp.uint8:
        return codes
    return jax.lax.bitcast_convert_type(codes, tensor.codes_dtype)


def _integer(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(f"uint{8 * dtype.itemsize}")
