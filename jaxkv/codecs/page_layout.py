"""How one page of a codec's codes and factors lies in memory: the base of all layouts.

A layout turns the logical record, keys and values of `kv_heads` heads over some tokens, into
named arrays and back without loss. Pools add leading axes, `[layers, pages, ...]`. A page's key
mean is no token's: the cache keeps it as an array of its own.
"""

from dataclasses import dataclass

import jax

from jaxkv.codecs.codec import KVCodec, Quantized

MAX_WASTE = 1.05  # allocated over useful bytes

Arrays = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """Base of both kinds. A record is `codes[..., kv_heads, tokens, head_dim]` with factors
    `[..., kv_heads, tokens]`; `tokens` is `page_size`, or fewer where single tokens are written
    (every word belongs to one token, so writing needs no read).
    """

    codec: KVCodec
    kv_heads: int
    head_dim: int
    page_size: int

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each array of one page."""
        raise NotImplementedError

    @property
    def token_axes(self) -> dict[str, int]:
        """Which (negative) axis of each array of `pack` counts tokens."""
        raise NotImplementedError

    @property
    def allocated_bytes(self) -> int:
        """Bytes of one page of all heads in memory, tile padding included."""
        return sum(s.size * s.dtype.itemsize for s in self.arrays.values())

    @property
    def useful_bytes(self) -> int:
        """Bytes of one page of all heads by the codec's own count, without a page mean."""
        key, value = self.codec.key, self.codec.value
        token = key.bytes_per_token(self.head_dim) + value.bytes_per_token(self.head_dim)
        return token * self.kv_heads * self.page_size

    def pack(self, key: Quantized, value: Quantized) -> Arrays:
        """Arrays of a record, shaped as `arrays` with its leading axes in front."""
        raise NotImplementedError

    def unpack(self, arrays: Arrays) -> tuple[Quantized, Quantized]:
        """Inverse of `pack`."""
        raise NotImplementedError

    def _check_waste(self):
        if self.allocated_bytes > MAX_WASTE * self.useful_bytes:
            raise ValueError(
                f"kv_heads={self.kv_heads}, head_dim={self.head_dim}: a page of {self.codec.name} "
                f"would take {self.allocated_bytes} bytes for {self.useful_bytes} useful ones."
            )
