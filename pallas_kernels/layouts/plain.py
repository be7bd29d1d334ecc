"""Page layout of exact values: keys and values unquantized, one row per token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.codecs.codec import Quantized
from pallas_kernels.layouts.page_layout import Arrays, PageLayout


@dataclass(frozen=True, kw_only=True)
class Plain(PageLayout):
    """Arrays `k` and `v`, each `[kv_heads, page_size, head_dim]`, in the codec's float types."""

    def __post_init__(self):
        if self.codec.lossy:
            raise ValueError(f"codec={self.codec.name!r} must be exact: this layout packs nothing.")

    def arrays(self, kv_heads: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (kv_heads, self.page_size, self.head_dim)
        return {
            "k": jax.ShapeDtypeStruct(shape, self.codec.key.codes_dtype),
            "v": jax.ShapeDtypeStruct(shape, self.codec.value.codes_dtype),
        }

    @property
    def head_axes(self) -> dict[str, int]:
        return {"k": -3, "v": -3}

    @property
    def token_axes(self) -> dict[str, int]:
        return {"k": -2, "v": -2}

    def pack(self, key: Quantized, value: Quantized) -> Arrays:
        return {"k": key.codes, "v": value.codes}

    def unpack(self, arrays: Arrays) -> tuple[Quantized, Quantized]:
        return Quantized(arrays["k"], ()), Quantized(arrays["v"], ())

    def gather(
        self, arrays: Arrays, layer: int | jax.Array, page: jax.Array
    ) -> tuple[Quantized, Quantized]:
        head = jnp.arange(self.kv_heads(arrays), dtype=jnp.int32)[None, :, None]
        return self.unpack({name: x[layer, page[:, None, :], head] for name, x in arrays.items()})
