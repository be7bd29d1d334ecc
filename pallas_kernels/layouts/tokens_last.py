"""Page layout for XLA on CPUs: codes in bytes, tokens on the last axis."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.codecs.codec import Quantized, TensorCodec
from pallas_kernels.layouts.packing import PARTS, check_packable, pack_planes, unpack_planes
from pallas_kernels.layouts.page_layout import Arrays, PageLayout, same_bits, stored_dtype


@dataclass(frozen=True, kw_only=True)
class TokensLast(PageLayout):
    """Codes of keys and of values as `[kv_heads, words, tokens]`, in planes of bytes (`packing`).

    These are the arrays of `TokenMajor` with the token axis last. Every step of unpacking runs
    along whole rows of tokens, which suits vector units for any number of bits: 3-bit codes read
    three times as fast as from token-major bytes.
    """

    dims_first: ClassVar[bool] = True

    def __post_init__(self):
        for tensor in (self.codec.key, self.codec.value):
            if tensor.bits in (2, 3, 4):
                check_packable(self.head_dim, tensor.bits, 8)

    def arrays(self, kv_heads: int) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = {}
        for side, tensor in (("k", self.codec.key), ("v", self.codec.value)):
            for name, width in zip(("codes", "high"), PARTS.get(tensor.bits, (0,)), strict=False):
                packed = tensor.bits in (2, 3, 4)
                rows = self.head_dim * width // 8 if packed else self.head_dim
                dtype = jnp.dtype("uint8") if packed else stored_dtype(tensor)
                shape = (kv_heads, rows, self.page_size)
                arrays[f"{side}_{name}"] = jax.ShapeDtypeStruct(shape, dtype)
            if dtypes := tensor.factor_dtypes:
                shape = (len(dtypes), kv_heads, self.page_size)
                arrays[f"{side}_factors"] = jax.ShapeDtypeStruct(shape, dtypes[0])
        return arrays

    @property
    def token_axes(self) -> dict[str, int]:
        return dict.fromkeys(self.arrays(1), -1)

    @property
    def head_axes(self) -> dict[str, int]:
        return {name: -2 if name.endswith("factors") else -3 for name in self.arrays(1)}

    def pack(self, key: Quantized, value: Quantized) -> Arrays:
        arrays = {}
        for side, tensor, record in (("k", self.codec.key, key), ("v", self.codec.value, value)):
            if tensor.bits in (2, 3, 4):
                words = pack_planes(record.codes, tensor.bits)
            else:
                words = (same_bits(record.codes, stored_dtype(tensor)),)
            for name, word in zip(("codes", "high"), words, strict=False):
                arrays[f"{side}_{name}"] = jnp.swapaxes(word, -1, -2)
            if record.factors:
                arrays[f"{side}_factors"] = jnp.stack(record.factors, axis=-3)
        return arrays

    def unpack(self, arrays: Arrays) -> tuple[Quantized, Quantized]:
        key, value = (
            self._record(arrays, side, tensor)
            for side, tensor in (("k", self.codec.key), ("v", self.codec.value))
        )
        turn = lambda record: record._replace(codes=jnp.swapaxes(record.codes, -1, -2))
        return turn(key), turn(value)

    def gather(
        self, arrays: Arrays, layer: int | jax.Array, page: jax.Array
    ) -> tuple[Quantized, Quantized]:
        head = jnp.arange(self.kv_heads(arrays), dtype=jnp.int32)[None, :, None]
        gathered = {}
        for name, pool in arrays.items():
            if name.endswith("factors"):
                factor = jnp.arange(pool.shape[2], dtype=jnp.int32)[None, :, None, None]
                gathered[name] = pool[layer, page[:, None, None], factor, head[:, None]]
            else:
                gathered[name] = pool[layer, page[:, None], head]
        return (
            self._record(gathered, "k", self.codec.key, factor_axis=1),
            self._record(gathered, "v", self.codec.value, factor_axis=1),
        )

    def _record(
        self, arrays: Arrays, side: str, tensor: TensorCodec, factor_axis: int = -3
    ) -> Quantized:
        """Unpacks one side into codes `[..., head_dim, tokens]` and factors."""
        codes = arrays[f"{side}_codes"]
        if tensor.bits in (2, 3, 4):
            words = [arrays[f"{side}_{n}"] for n in ("codes", "high")[: len(PARTS[tensor.bits])]]
            codes = unpack_planes(tuple(words), tensor.bits, dims_axis=-2)
        else:
            codes = same_bits(codes, tensor.codes_dtype)
        factors = [
            jax.lax.index_in_dim(
                arrays[f"{side}_factors"], i, factor_axis % arrays[f"{side}_factors"].ndim,
                keepdims=False,
            )
            for i in range(len(tensor.factor_dtypes))
        ]  # fmt: skip
        return Quantized(codes, tuple(factors))
