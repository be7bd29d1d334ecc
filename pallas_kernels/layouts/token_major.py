"""Page layout for GPUs: one row of words per token (16 or 32 bits; bytes where nothing fits)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs.codec import Quantized, TensorCodec
from pallas_kernels.layouts.packing import (
    PARTS,
    WORDS,
    check_packable,
    pack_pair,
    pack_planes,
    unpack_pair,
    unpack_planes,
)
from pallas_kernels.layouts.page_layout import (
    Arrays,
    PageLayout,
    is_float8,
    same_bits,
    stored_dtype,
)


class FactorPlace(NamedTuple):
    """Where one of the factors is stored, for every token alike."""

    array: str
    row: int
    half: int | None  # 0 for the low half of a word, 1 for the high one; None for a whole word


@dataclass(frozen=True, kw_only=True)
class TokenMajor(PageLayout):
    """Codes of keys and of values as `[kv_heads, tokens, words]`, packed in planes (`packing`).

    Arrays:
      k_codes, v_codes: packed codes. Exact values stay unpacked in their own dtype; 8-bit codes
        stay unpacked bytes where words have 8 bits, float8 unless words have 16.
      k_high, v_high: the third bits of 3-bit codes.
      factors_*: `[rows, kv_heads, tokens]`, one array per dtype of words; see `factor_places`.
    """

    word_bits: int = 8

    def __post_init__(self):
        for tensor in (self.codec.key, self.codec.value):
            if self._packs(tensor):
                check_packable(self.head_dim, tensor.bits, self.word_bits)

    def arrays(self, kv_heads: int) -> dict[str, jax.ShapeDtypeStruct]:
        rows = (kv_heads, self.page_size)
        arrays = {}
        for side, tensor in (("k", self.codec.key), ("v", self.codec.value)):
            if self._packs(tensor):
                for name, width in zip(("codes", "high"), PARTS[tensor.bits], strict=False):
                    words = self.head_dim * width // self.word_bits
                    dtype = jnp.dtype(f"uint{self.word_bits}")
                    arrays[f"{side}_{name}"] = jax.ShapeDtypeStruct((*rows, words), dtype)
            else:
                shape = (*rows, self.head_dim)
                arrays[f"{side}_codes"] = jax.ShapeDtypeStruct(shape, stored_dtype(tensor))
        for place in sum(self.factor_places, ()):
            dtype = jnp.dtype(place.array.removeprefix("factors_"))
            arrays[place.array] = jax.ShapeDtypeStruct((place.row + 1, *rows), dtype)
        return arrays

    @property
    def factor_places(self) -> tuple[tuple[FactorPlace, ...], tuple[FactorPlace, ...]]:
        """Places of the keys' and of the values' factors, the same for every token.

        On a GPU a load's latency does not depend on its width, so the factors of a token (the
        keys' first) share words in pairs. If their number is odd, the first has its own word,
        because it is needed first.
        """
        keys, values = self.codec.key.factor_dtypes, self.codec.value.factor_dtypes
        places: dict[int, FactorPlace] = {}
        for dtype in dict.fromkeys(keys + values):
            same = [i for i, other in enumerate(keys + values) if other == dtype]
            if len(same) % 2:
                places[same.pop(0)] = FactorPlace(f"factors_{dtype}", 0, None)
            word = WORDS[16 * dtype.itemsize]
            for n, i in enumerate(same):
                places[i] = FactorPlace(f"factors_{word}", *divmod(n, 2))
        in_order = tuple(places[i] for i in range(len(places)))
        return in_order[: len(keys)], in_order[len(keys) :]

    def _packs(self, tensor: TensorCodec) -> bool:
        if tensor.codes_dtype in (jnp.uint8, jnp.int8):
            return tensor.bits < 8 or self.word_bits > 8
        return is_float8(tensor) and self.word_bits == 16

    @property
    def token_axes(self) -> dict[str, int]:
        return {name: -1 if name.startswith("factors") else -2 for name in self.arrays(1)}

    @property
    def head_axes(self) -> dict[str, int]:
        return {name: axis - 1 for name, axis in self.token_axes.items()}

    def gather(
        self, arrays: Arrays, layer: int | jax.Array, page: jax.Array
    ) -> tuple[Quantized, Quantized]:
        x = {name: pool[layer, page] for name, pool in arrays.items()}
        heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # [batch, n, kv_heads, ...] as gathered
        key, value = self.unpack(x)
        return (
            Quantized(heads_first(key.codes), tuple(map(heads_first, key.factors))),
            Quantized(heads_first(value.codes), tuple(map(heads_first, value.factors))),
        )

    def pack(self, key: Quantized, value: Quantized) -> Arrays:
        arrays = {}
        for side, tensor, record in (("k", self.codec.key, key), ("v", self.codec.value, value)):
            if self._packs(tensor):
                codes = same_bits(_flip(record.codes, tensor, jnp.uint8), jnp.dtype("uint8"))
                words = pack_planes(codes, tensor.bits, self.word_bits)
            else:
                words = (same_bits(record.codes, stored_dtype(tensor)),)
            for name, word in zip(("codes", "high"), words, strict=False):
                arrays[f"{side}_{name}"] = word
        rows: dict[str, list[jax.Array]] = {}
        for (name, _), word in self.factor_words(key.factors, value.factors).items():
            rows.setdefault(name, []).append(word)
        return arrays | {name: jnp.stack(words, axis=-3) for name, words in rows.items()}

    def factor_words(
        self, key: tuple[jax.Array, ...], value: tuple[jax.Array, ...]
    ) -> dict[tuple[str, int], jax.Array]:
        """Packs factors into words of the factors' shape; returns them by array and row."""
        parts: dict[tuple[str, int], list[jax.Array]] = {}
        for place, factor in zip(sum(self.factor_places, ()), (*key, *value), strict=True):
            parts.setdefault((place.array, place.row), []).append(factor)
        return {at: pack_pair(*x) if len(x) == 2 else x[0] for at, x in parts.items()}

    def unpack(self, arrays: Arrays) -> tuple[Quantized, Quantized]:
        records = []
        for side, tensor, places in zip(
            "kv", (self.codec.key, self.codec.value), self.factor_places, strict=True
        ):
            codes = arrays[f"{side}_codes"]
            if self._packs(tensor):
                words = [
                    arrays[f"{side}_{n}"] for n in ("codes", "high")[: len(PARTS[tensor.bits])]
                ]
                codes = _flip(unpack_planes(tuple(words), tensor.bits), tensor, jnp.int8)
            codes = same_bits(codes, tensor.codes_dtype)
            factors = []
            for place, dtype in zip(places, tensor.factor_dtypes, strict=True):
                word = arrays[place.array][..., place.row, :, :]
                factors.append(word if place.half is None else unpack_pair(word, dtype)[place.half])
            records.append(Quantized(codes, tuple(factors)))
        return records[0], records[1]


def _flip(codes: jax.Array, tensor: TensorCodec, dtype) -> jax.Array:
    """Flips the top bit of signed codes, so that words hold `code + 128`; keeps other codes."""
    if tensor.codes_dtype != jnp.int8:
        return codes
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(codes, jnp.uint8) ^ np.uint8(128), dtype
    )
