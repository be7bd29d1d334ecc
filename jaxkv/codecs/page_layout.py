"""How one page of a codec's codes and factors lies in memory: the base of all layouts.

A layout turns the logical record, keys and values of `kv_heads` heads over some tokens, into
named arrays and back without loss. Pools add leading axes, `[layers, pages, ...]`. A page's key
mean is no token's: the cache keeps it as an array of its own.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxkv.codecs.codec import KVCodec, Quantized, TensorCodec

MAX_WASTE = 1.05  # allocated over useful bytes

Arrays = dict[str, jax.Array]


def is_float8(tensor: TensorCodec) -> bool:
    """Whether codes are float8 values."""
    return tensor.codes_dtype.itemsize == 1 and jnp.issubdtype(tensor.codes_dtype, jnp.floating)


def stored_dtype(tensor: TensorCodec) -> jnp.dtype:
    """Dtype of codes that are kept unpacked: their own, but bytes for float8.

    XLA has no scatter of float8: to write one token it would convert the whole pool and back, and
    a bitcast around the scatter makes it copy a pool that a loop carries.
    """
    return jnp.dtype("uint8") if is_float8(tensor) else tensor.codes_dtype


def same_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` read as another dtype of its size."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """Base of both kinds. A record is `codes[..., kv_heads, tokens, head_dim]` with factors
    `[..., kv_heads, tokens]`; `tokens` is `page_size`, or fewer where single tokens are written
    (every word belongs to one token, so writing needs no read).
    """

    dims_first: ClassVar[bool] = False  # how `gather` gives codes

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

    def gather(
        self, arrays: Arrays, layer: int | jax.Array, page: jax.Array
    ) -> tuple[Quantized, Quantized]:
        """Pages side by side: codes `[batch, kv_heads, n, ...]`, factors `[..., n, tokens]`.

        The last axes of codes are `head_dim, tokens` if `dims_first`, else `tokens, head_dim`.

        Args:
          arrays: pools, each `[layers, pages, ...]`.
          layer: index, static or traced.
          page: `i32[batch, n]`.
        """
        raise NotImplementedError(f"{type(self).__name__} is read by its own kernels only.")

    def append(
        self,
        arrays: Arrays,
        packed: Arrays,
        layer: int | jax.Array,
        page: jax.Array,
        slot: jax.Array,
    ) -> Arrays:
        """Writes single tokens into pools; ids that are no page are skipped.

        Args:
          arrays: pools, each `[layers, pages, ...]`.
          packed: `pack` of a record `[batch, kv_heads, tokens, head_dim]`.
          layer: index, static or traced.
          page: `i32[batch, tokens]`.
          slot: `i32[batch, tokens]`, place in the page.
        """
        new = {}
        for name, axis in self.token_axes.items():
            pool, x = arrays[name], packed[name]
            place = [layer, page] + [slice(None)] * (pool.ndim - 2)
            place[pool.ndim + axis] = slot
            # Indices apart from each other bring their axes to the front: [batch, tokens, ...].
            new[name] = pool.at[tuple(place)].set(jnp.moveaxis(x, axis, 1), mode="drop")
        return new

    def _check_waste(self):
        if self.allocated_bytes > MAX_WASTE * self.useful_bytes:
            raise ValueError(
                f"kv_heads={self.kv_heads}, head_dim={self.head_dim}: a page of {self.codec.name} "
                f"would take {self.allocated_bytes} bytes for {self.useful_bytes} useful ones."
            )
