"""TurboQuant: rotate, normalise, round to a Gaussian codebook; one stored factor per vector.

After Zandieh et al., TurboQuant (2025), with the norm correction folded into the stored factor,
optional signs before the transform, and optional search of the codes. A vector is read as
`factor * level`, without a second normalisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs.codebooks import Codebook, get_codebook
from pallas_kernels.codecs.codec import SMALLEST, Quantized, TensorCodec, finite_input
from pallas_kernels.codecs.factors import FACTOR_DTYPES, store_factor
from pallas_kernels.codecs.rotation import channel_signs, rotate, unrotate

# Scales that the code search tries. 1 is among them, so that search never increases the error.
# These 12 reduce the 4-bit error by 4.5 % more than 8 from 0.84 to 1.13; 64 would give 1.5 % more.
PRE_SCALES = (0.74, 0.78, 0.82, 0.86, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25)
FACTORS = ("norm", "least_squares", "unbiased")


@dataclass(frozen=True, kw_only=True)
class TurboQuant(TensorCodec):
    """Codes `c` of the rotated vector `y`, read as `factor * c`.

    Attributes:
      bits: 2, 3 or 4.
      codebook: "cubic", "quintic" or "lloyd_max".
      factor: "norm", `|y| / |c|`, keeps the length (as published); "least_squares",
        `<y, c> / |c|^2`, has the smallest error; "unbiased", `|y|^2 / <y, c>`, makes
        `<y, factor c> = |y|^2`, so that scores are not shrunk.
      factor_kind: "float16" or "ue5m3" (8 bits), see `factors`.
      search: whether to scale by each of `PRE_SCALES` before rounding and keep the codes with the
        best cosine.
      sign_seed: seed of the fixed +-1 per channel before the transform; None for all ones.
      mean: whether a per-channel mean is removed first.
    """

    rotated: ClassVar[bool] = True
    always_finite: ClassVar[bool] = True
    pre_scales: ClassVar[tuple[float, ...]] = PRE_SCALES  # tried by `search`

    bits: int = 4  # pyright: ignore[reportIncompatibleMethodOverride]
    codebook: str = "cubic"
    factor: Literal["norm", "least_squares", "unbiased"] = "norm"
    factor_kind: Literal["float16", "ue5m3"] = "float16"
    search: bool = False
    sign_seed: int | None = None
    mean: bool = False

    def __post_init__(self):
        get_codebook(self.codebook, self.bits)  # raises if there is no such codebook
        if self.factor not in FACTORS:
            raise ValueError(f"factor={self.factor!r} must be one of {FACTORS}.")
        if self.factor_kind not in FACTOR_DTYPES:
            raise ValueError(f"factor_kind={self.factor_kind!r} must be 'float16' or 'ue5m3'.")

    @property
    def levels(self) -> Codebook:
        return get_codebook(self.codebook, self.bits)

    @property
    def factor_dtypes(self) -> tuple[jnp.dtype, ...]:
        return (FACTOR_DTYPES[self.factor_kind],)

    @property
    def uses_mean(self) -> bool:
        return self.mean

    def quantize(self, x: jax.Array, mean: jax.Array | None = None) -> Quantized:
        z, length = self.normalize(x, mean, self.rotate)
        codes = self.nearest_codes(z)
        return Quantized(codes, (self.stored_factor(z, codes, length),))

    def normalize(
        self, x: jax.Array, mean: jax.Array | None, rotate: Callable[[jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Rotates and normalises: `z` and `length` with `rotate(x - mean) = z * length`.

        Returns:
          `z`, `f32[..., head_dim]` of norm `sqrt(head_dim)` or 0, to be rounded to levels; and
          `length`, `f32[...]`.

        Raises:
          ValueError: a mean was given to a codec without one.
        """
        if mean is not None and not self.mean:
            raise ValueError(f"a mean was given, but {self.mean=}.")
        x = finite_input(x, mean)
        largest = jnp.max(jnp.abs(x), axis=-1)
        largest = jnp.where(largest > SMALLEST, largest, 0)
        # Divided by the largest magnitude, squares neither overflow nor vanish; zero stays zero.
        scaled = x / jnp.where(largest > 0, largest, 1)[..., None]
        y = rotate(jnp.where(largest[..., None] > 0, scaled, 0))
        root = np.float32(np.sqrt(x.shape[-1]))
        norm = jnp.sqrt(jnp.sum(y * y, axis=-1))
        return y * (root / jnp.where(norm > 0, norm, 1))[..., None], (norm / root) * largest

    def stored_factor(self, z: jax.Array, codes: jax.Array, length: jax.Array) -> jax.Array:
        """The stored factor of a vector `z * length` with these codes."""
        level, root = self.code_values(codes), np.float32(np.sqrt(z.shape[-1]))
        product, square = jnp.sum(z * level, axis=-1), jnp.sum(level * level, axis=-1)
        factor = {  # for z, whose length is root; no level is 0, so square > 0
            "norm": lambda: root / jnp.sqrt(square),
            "least_squares": lambda: product / square,
            "unbiased": lambda: root * root / jnp.where(product > 0, product, 1),
        }[self.factor]()
        return store_factor(factor * length, self.factor_kind)

    def code_values(self, codes: jax.Array) -> jax.Array:
        return self.levels.decode(codes)

    def rotate(self, x: jax.Array) -> jax.Array:
        return rotate(x, self._signs(x))

    def unrotate(self, x: jax.Array) -> jax.Array:
        return unrotate(x, self._signs(x))

    def _signs(self, x: jax.Array) -> np.ndarray | None:
        return None if self.sign_seed is None else channel_signs(x.shape[-1], self.sign_seed)

    def nearest_codes(self, z: jax.Array) -> jax.Array:
        """Codes of the levels nearest to z; with `search`, to z at the scale of the best cosine."""
        if not self.search:
            return self.levels.encode(z)
        scales = np.asarray(PRE_SCALES, np.float32)
        trial = z[..., None, :] * scales.reshape((1,) * (z.ndim - 1) + (-1, 1))
        best = jnp.argmax(self.cosine(z[..., None, :], trial), axis=-1)
        return self.levels.encode(z * jnp.asarray(scales)[best][..., None])

    def cosine(self, z: jax.Array, trial: jax.Array) -> jax.Array:
        """Cosine between z and the levels nearest to `trial`, times z's length."""
        level = self.levels.decode(self.levels.encode(trial))  # fused into the two sums
        product, square = jnp.sum(z * level, -1), jnp.sum(level * level, -1)
        return product * jax.lax.rsqrt(square)
