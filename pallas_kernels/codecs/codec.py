"""The interface of KV codecs: codes and per-token factors for one head vector, and their bytes.

A `TensorCodec` quantizes keys or values; a `KVCodec` pairs two of them and adds what the cache must
know. How codes lie in memory is decided by a layout (`pallas_kernels.layouts`).

Input that is not finite: in its own token, NaN counts as 0 and +-inf as +-1e30, and the token's
factor saturates. The token dequantizes to finite values, and no other token changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs.factors import (
    FACTOR_DTYPES,
    FLOAT16_MAX,
    load_factor,
    round_to_float16,
)

INPUT_MAX = 1e30  # larger magnitudes are clipped: differences of two stay far from overflow
SMALLEST = 1e-30  # a vector below it in every channel counts as zero: its factor would round to 0
PACKED_BITS = (2, 3, 4)  # widths of codes that share bytes
EXACT_DTYPES = ("bfloat16", "float16", "float32")
_MEAN_DTYPE = jnp.dtype("float16")


class Quantized(NamedTuple):
    """Quantized vectors before they are packed: `codes[..., head_dim]`, each factor `[...]`."""

    codes: jax.Array  # u8, i8 or fp8; for `Exact`, the values themselves
    factors: tuple[jax.Array, ...]  # scale, then zero if there is one; f16, or u8 for ue5m3


@dataclass(frozen=True)
class TensorCodec:
    """Base of the codecs of one tensor: static, hashable, never traced.

    A vector reads as `scale * code_values(codes) + zero`, so attention may work on `code_values`
    and fold scale and zero into its scores and probabilities. A codec of one's own defines `bits`,
    `factor_dtypes` and `quantize`, and `code_values` where a code is not its own level;
    `check_codec` tries all that is asked of it.
    """

    # Whether codes describe rotated vectors; then queries are rotated and outputs rotated back.
    rotated: ClassVar[bool] = False
    # Whether levels are finite whatever was quantized (factors must be, in every codec). Attention
    # takes care that other levels reach only the rows that see them.
    always_finite: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        """Bits of one code."""
        raise NotImplementedError

    @property
    def codes_dtype(self) -> jnp.dtype:
        """Dtype of unpacked codes."""
        return jnp.dtype("uint8")

    @property
    def factor_dtypes(self) -> tuple[jnp.dtype, ...]:
        """Stored dtype of each factor."""
        return ()

    @property
    def uses_mean(self) -> bool:
        """Whether `quantize` expects a per-channel mean to be removed."""
        return False

    def bytes_per_token(self, head_dim: int) -> int:
        """Stored bytes of one token and head: packed codes and factors, no padding.

        Raises:
          ValueError: the codes of a vector do not fill whole bytes.
        """
        code_bits = self.bits * head_dim
        if code_bits % 8:
            raise ValueError(f"{head_dim=} times {self.bits} bits is no whole number of bytes.")
        return code_bits // 8 + sum(dtype.itemsize for dtype in self.factor_dtypes)

    def quantize(self, x: jax.Array, mean: jax.Array | None = None) -> Quantized:
        """Quantizes `x - mean`, each vector along the last axis by itself.

        Args:
          x: `[..., head_dim]`, any float dtype; arithmetic is float32.
          mean: broadcastable to x (trailing axes), or None for zero.
        """
        raise NotImplementedError

    def code_values(self, codes: jax.Array) -> jax.Array:
        """Levels of the codes, before scale and zero are applied: `f32`, shaped like `codes`.

        Code by code: attention calls it with the axes in any order.
        """
        return codes.astype(jnp.float32)

    def factor_values(self, factors: tuple[jax.Array, ...]) -> tuple[jax.Array | None, ...]:
        """`(scale, zero)`, each `f32[...]`; None for a factor that the codec does not store."""
        values = [load_factor(factor) for factor in factors]
        return (*values, *[None] * (2 - len(values)))

    def dequantize(self, quantized: Quantized) -> jax.Array:
        """Vectors `f32[..., head_dim]`, without the mean, still rotated if `rotated`."""
        values = self.code_values(quantized.codes)
        scale, zero = self.factor_values(quantized.factors)
        values = values if scale is None else values * scale[..., None]
        return values if zero is None else values + zero[..., None]

    def rotate(self, x: jax.Array) -> jax.Array:
        """Rotates queries into the space of the codes, `f32[..., head_dim]`; keeps dot products."""
        return x.astype(jnp.float32)

    def unrotate(self, x: jax.Array) -> jax.Array:
        """Rotates attention's outputs back, `f32[..., head_dim]`."""
        return x.astype(jnp.float32)


def dequantize_original(
    codec: TensorCodec, quantized: Quantized, mean: jax.Array | None = None
) -> jax.Array:
    """Approximates the vectors that were quantized, `f32[..., head_dim]`: unrotated, with mean."""
    x = codec.unrotate(codec.dequantize(quantized))
    return x if mean is None else x + _mean_like(mean, x)


@dataclass(frozen=True)
class Exact(TensorCodec):
    """The identity: values kept in `dtype`, NaN and infinity included."""

    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.dtype not in EXACT_DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(EXACT_DTYPES)}.")

    @property
    def bits(self) -> int:
        return 8 * self.codes_dtype.itemsize

    @property
    def codes_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def quantize(self, x: jax.Array, mean: jax.Array | None = None) -> Quantized:
        if mean is not None:
            raise ValueError("Exact keeps values as they are; mean must be None.")
        return Quantized(x.astype(self.codes_dtype), ())


@dataclass(frozen=True, kw_only=True)
class KVCodec:
    """A key codec, a value codec, and which tokens stay exact beside codes; static and hashable.

    Attributes:
      name: for messages and reports.
      key: codec of keys.
      value: codec of values.
      recent_pages: number of newest pages that are read exactly.
      sink_tokens: number of first tokens whose pages stay exact.
      key_mean: which per-channel mean the cache removes from keys: None, "static" (fitted for the
        model beforehand) or "page" (`key_page_mean`, stored with each page). Attention adds
        `q @ mean` to the scores.
    """

    name: str
    key: TensorCodec
    value: TensorCodec
    recent_pages: int = 0
    sink_tokens: int = 0
    key_mean: Literal["static", "page"] | None = None

    def __post_init__(self):
        for name in ("key", "value"):
            check_tensor(name, getattr(self, name))
        if self.key_mean not in (None, "static", "page"):
            raise ValueError(f"key_mean={self.key_mean!r} must be None, 'static' or 'page'.")
        if (self.key_mean is not None) != self.key.uses_mean:
            raise ValueError(f"key_mean={self.key_mean!r} disagrees with {self.key.uses_mean=}.")
        if self.value.uses_mean:
            raise ValueError("Values have no mean: value.uses_mean must be False.")
        for name in ("recent_pages", "sink_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.key_mean == "page" and self.recent_pages < 1:
            raise ValueError(
                f"recent_pages={self.recent_pages} must be at least 1 for codec {self.name!r}: a "
                "page's mean is known when the page is complete."
            )

    @property
    def lossy(self) -> bool:
        """False iff both tensors are kept exactly."""
        return not (isinstance(self.key, Exact) and isinstance(self.value, Exact))

    def key_page_mean(
        self, keys: jax.Array, rotate: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """The stored mean of a page's keys `[..., page_size, head_dim]`; see `stored_mean`."""
        return self.stored_mean(page_mean(keys, axis=-2), rotate)

    def stored_mean(
        self, mean: jax.Array, rotate: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """Rotates a mean of keys, `[..., head_dim]`, for storage: `f16[..., head_dim]`.

        It is rotated once, when it is written, so that attention needs only the rotated query.
        `rotate` replaces the key codec's own rotation in kernels that hold its matrix.
        """
        mean = (rotate or self.key.rotate)(mean)
        return round_to_float16(mean).astype(_MEAN_DTYPE)

    def page_bytes(self, head_dim: int, page_size: int) -> int:
        """Stored bytes of one page and kv head: keys, values and the page's mean."""
        token = self.key.bytes_per_token(head_dim) + self.value.bytes_per_token(head_dim)
        mean = head_dim * _MEAN_DTYPE.itemsize if self.key_mean == "page" else 0
        return page_size * token + mean

    def bits_per_value(self, head_dim: int, page_size: int) -> float:
        """Stored bits per cached number, averaged over keys and values, exact tokens left out."""
        return self.page_bytes(head_dim, page_size) * 8 / (2 * head_dim * page_size)


def check_tensor(name: str, codec: TensorCodec) -> None:
    """Raises ValueError unless pages can hold what the codec says that it makes.

    Args:
      name: of the codec, for the message.
      codec: of keys or of values.
    """
    if not isinstance(codec, TensorCodec):
        raise ValueError(f"{name}={codec!r} must be a TensorCodec, such as MinMax(4).")
    kind = type(codec).__name__
    try:
        hash(codec)
    except TypeError as error:
        raise ValueError(
            f"{name} {kind} must be hashable, as a frozen dataclass is: {error}."
        ) from None
    bits, dtype, factors = codec.bits, jnp.dtype(codec.codes_dtype), codec.factor_dtypes
    if not (bits == 8 * dtype.itemsize or (bits in PACKED_BITS and dtype == jnp.uint8)):
        raise ValueError(
            f"{name} {kind}: bits={bits!r} must be one of {PACKED_BITS} with codes_dtype uint8, or "
            f"the width of codes_dtype, {8 * dtype.itemsize}."
        )
    stored = tuple(map(jnp.dtype, factors))
    if len(stored) > 2 or len(set(stored)) > 1 or not set(stored) <= set(FACTOR_DTYPES.values()):
        names = ", ".join(map(str, stored))
        raise ValueError(
            f"{name} {kind}: factor_dtypes=({names}) must be at most a scale and a zero, both "
            "float16 or both uint8."
        )


def page_mean(x: jax.Array, axis: int, valid: jax.Array | None = None) -> jax.Array:
    """Per-channel mean over the tokens of a page, `f16`, shaped like `x` without `axis`.

    Tokens with a channel that is not finite or is beyond float16's range are left out, so one bad
    token cannot spoil its page. A page without a good token has mean zero.

    Args:
      x: `[..., head_dim]`.
      axis: the token axis, not the last one.
      valid: `bool`, x's shape without head_dim: tokens to count; None for all.
    """
    x = x.astype(jnp.float32)
    axis = axis % x.ndim
    bad = jnp.where(jnp.abs(x) <= FLOAT16_MAX, 0.0, 1.0)  # 1 for NaN
    good = jnp.max(bad, axis=-1) == 0
    good = good if valid is None else good & valid
    total = jnp.sum(jnp.where(good[..., None], x, 0), axis=axis)
    count = jnp.sum(good.astype(jnp.float32), axis=axis)[..., None]
    return round_to_float16(total / jnp.maximum(count, 1)).astype(_MEAN_DTYPE)


def finite_input(x: jax.Array, mean: jax.Array | None = None) -> jax.Array:
    """`x - mean` in float32 with NaN as 0 and magnitudes limited to `INPUT_MAX`."""
    clean = lambda a: jnp.clip(jnp.where(jnp.isnan(a), 0, a), -INPUT_MAX, INPUT_MAX)
    x = clean(x.astype(jnp.float32))
    return x if mean is None else x - clean(_mean_like(mean, x))


def _mean_like(mean: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(mean).astype(np.float32), x.shape)
