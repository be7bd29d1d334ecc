"""How one page of a codec's codes and factors lies in memory: the base of all layouts.

A layout turns the logical record, keys and values of some heads over some tokens, into named
arrays and back without loss. Pools add leading axes, `[layers, pages, ...]`. A layout does not
know how many heads there are: it reads that from arrays, so it serves a pool that is sharded over
heads as well as a whole one. A page's key mean belongs to no token: pools keep it as an array of
its own.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.codecs.codec import KVCodec, Quantized, TensorCodec

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
    """Base of all layouts.

    A record is `codes[..., kv_heads, tokens, head_dim]` with factors `[..., kv_heads, tokens]`;
    `tokens` is `page_size`, or fewer where single tokens are written. Every word belongs to one
    token, so writing a token reads nothing.
    """

    dims_first: ClassVar[bool] = False  # how `gather` gives codes

    codec: KVCodec
    head_dim: int
    page_size: int

    def arrays(self, kv_heads: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each array of one page."""
        raise NotImplementedError

    def kv_heads(self, arrays: Arrays) -> int:
        """Heads that arrays hold, `[..., *shape of a page's]`, by their shapes."""
        name, axis = next(iter(self.head_axes.items()))
        return arrays[name].shape[axis]

    @property
    def head_axes(self) -> dict[str, int]:
        """Which (negative) axis of each array counts heads: the one to shard over."""
        raise NotImplementedError

    @property
    def token_axes(self) -> dict[str, int]:
        """Which (negative) axis of each array of `pack` counts tokens."""
        raise NotImplementedError

    def allocated_bytes(self, kv_heads: int) -> int:
        """Bytes of one page of `kv_heads` heads in memory, tile padding included."""
        return sum(s.size * s.dtype.itemsize for s in self.arrays(kv_heads).values())

    def useful_bytes(self, kv_heads: int) -> int:
        """The same by the codec's own count, without a page mean."""
        key, value = self.codec.key, self.codec.value
        token = key.bytes_per_token(self.head_dim) + value.bytes_per_token(self.head_dim)
        return token * kv_heads * self.page_size

    def check_waste(self, kv_heads: int) -> None:
        """Raises ValueError where padding would take more than 5 % of a page of so many heads."""
        allocated, useful = self.allocated_bytes(kv_heads), self.useful_bytes(kv_heads)
        if allocated > MAX_WASTE * useful:
            raise ValueError(
                f"{kv_heads=}, head_dim={self.head_dim}: a page of {self.codec.name} would take "
                f"{allocated} bytes for {useful} useful ones."
            )

    def pack(self, key: Quantized, value: Quantized) -> Arrays:
        """Arrays of a record, shaped as `arrays` says, with its leading axes in front."""
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
