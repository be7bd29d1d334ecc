"""How one page of a codec's codes and factors lies in memory: the base of all layouts.

A layout turns a record (the quantized keys and values of some heads and tokens) into named arrays
and back without loss. Pools add leading axes, `[layers, pages, ...]`. A layout does not store the
number of heads: it reads that from the arrays, so it also serves a pool that is sharded over heads.
A page's key mean belongs to no single token, so pools keep it as a separate array.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.codecs.codec import KVCodec, Quantized, TensorCodec

MAX_WASTE = 1.05  # most allocated bytes per useful byte

Arrays = dict[str, jax.Array]


def is_float8(tensor: TensorCodec) -> bool:
    """Whether codes are float8 values."""
    return tensor.codes_dtype.itemsize == 1 and jnp.issubdtype(tensor.codes_dtype, jnp.floating)


def stored_dtype(tensor: TensorCodec) -> jnp.dtype:
    """Dtype in which unpacked codes are stored: their own, except that float8 is kept as uint8.

    XLA has no float8 scatter: to write one token it would convert the whole pool and back. A
    bitcast around the scatter does not help, as XLA then copies a pool that a loop carries.
    """
    return jnp.dtype("uint8") if is_float8(tensor) else tensor.codes_dtype


def same_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The bits of `x` read as another dtype of the same size."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """Base of all layouts.

    A record is `codes[..., kv_heads, tokens, head_dim]` with factors `[..., kv_heads, tokens]`;
    `tokens` is `page_size`, or fewer where single tokens are written. Every stored word belongs to
    one token, so a token is written without reading what is there.
    """

    dims_first: ClassVar[bool] = False  # whether `gather` puts head_dim before tokens

    codec: KVCodec
    head_dim: int
    page_size: int

    def arrays(self, kv_heads: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each array of one page."""
        raise NotImplementedError

    def kv_heads(self, arrays: Arrays) -> int:
        """Number of heads that `arrays` hold, read from their shapes; leading axes are ignored."""
        name, axis = next(iter(self.head_axes.items()))
        return arrays[name].shape[axis]

    @property
    def head_axes(self) -> dict[str, int]:
        """The (negative) axis of each array that counts heads: the one to shard over."""
        raise NotImplementedError

    @property
    def token_axes(self) -> dict[str, int]:
        """The (negative) axis of each array of `pack` that counts tokens."""
        raise NotImplementedError

    def allocated_bytes(self, kv_heads: int) -> int:
        """Bytes of one page of `kv_heads` heads in memory, tile padding included."""
        return sum(s.size * s.dtype.itemsize for s in self.arrays(kv_heads).values())

    def useful_bytes(self, kv_heads: int) -> int:
        """Bytes of one page by the codec's own count, without padding or page mean."""
        key, value = self.codec.key, self.codec.value
        token = key.bytes_per_token(self.head_dim) + value.bytes_per_token(self.head_dim)
        return token * kv_heads * self.page_size

    def check_waste(self, kv_heads: int) -> None:
        """Raises ValueError if padding adds more than 5 % to a page of `kv_heads` heads."""
        allocated, useful = self.allocated_bytes(kv_heads), self.useful_bytes(kv_heads)
        if allocated > MAX_WASTE * useful:
            raise ValueError(
                f"{kv_heads=}, head_dim={self.head_dim}: a page of {self.codec.name} would take "
                f"{allocated} bytes for {useful} useful ones."
            )

    def pack(self, key: Quantized, value: Quantized) -> Arrays:
        """Packs a record into arrays shaped as `arrays` says, after the record's leading axes."""
        raise NotImplementedError

    def unpack(self, arrays: Arrays) -> tuple[Quantized, Quantized]:
        """Inverse of `pack`."""
        raise NotImplementedError

    def gather(
        self, arrays: Arrays, layer: int | jax.Array, page: jax.Array
    ) -> tuple[Quantized, Quantized]:
        """Reads whole pages: codes `[batch, kv_heads, n, ...]`, factors `[..., n, tokens]`.

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
        """Writes single tokens into pools; page ids outside the pool are skipped.

        Args:
          arrays: pools, each `[layers, pages, ...]`.
          packed: result of `pack` for a record `[batch, kv_heads, tokens, head_dim]`.
          layer: index, static or traced.
          page: `i32[batch, tokens]`.
          slot: `i32[batch, tokens]`, place in the page.
        """
        new = {}
        for name, axis in self.token_axes.items():
            pool, x = arrays[name], packed[name]
            place = [layer, page] + [slice(None)] * (pool.ndim - 2)
            place[pool.ndim + axis] = slot
            # Index arrays with a slice between them put their axes in front: [batch, tokens, ...].
            new[name] = pool.at[tuple(place)].set(jnp.moveaxis(x, axis, 1), mode="drop")
        return new
