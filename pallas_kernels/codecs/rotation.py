"""Orthonormal rotation of head vectors that spreads outlier channels over all channels.

`H_(2^k) (x) C_m` for `head_dim = 2^k m`, m odd: a normalised Walsh-Hadamard transform times a
small m-point one. Every factor is symmetric, so the rotation is its own inverse.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

DENSE_LIMIT = 256  # above it, halves are rotated separately and joined by a butterfly


@functools.cache
def rotation_matrix(head_dim: int) -> np.ndarray:
    """The symmetric orthonormal `f32[head_dim, head_dim]` matrix, without signs.

    Raises:
      ValueError: head_dim is odd or not positive.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"{head_dim=} must be even and positive.")
    m = head_dim // (head_dim & -head_dim)
    matrix = _mixing_matrix(m)
    while len(matrix) < head_dim:
        matrix = np.kron(np.array([[1, 1], [1, -1]]) / np.sqrt(2), matrix)
    matrix = matrix.astype(np.float32)
    matrix.flags.writeable = False
    return matrix


@functools.cache
def channel_signs(head_dim: int, seed: int | None) -> np.ndarray:
    """Fixed `f32[head_dim]` of +-1, the same on every platform; `seed=None` gives all ones."""
    if seed is None:
        signs = np.ones(head_dim, np.float32)
    else:  # raw bits: NumPy keeps bit generators stable across versions, not distributions
        bits = np.random.PCG64(np.random.SeedSequence([seed, head_dim])).random_raw(head_dim)
        signs = 1 - 2 * (bits >> np.uint64(63)).astype(np.float32)
    signs.flags.writeable = False
    return signs


def rotate(x: jax.Array, signs: np.ndarray | None = None) -> jax.Array:
    """`H (signs * x)` over the last axis, float32 throughout.

    Args:
      x: `[..., head_dim]`, any float dtype.
      signs: `f32[head_dim]` of +-1 (`channel_signs`), or None for all ones.

    Returns:
      `f32[..., head_dim]` of the same norm; `rotate(q) @ rotate(k) == q @ k`.
    """
    x = x.astype(jnp.float32)
    return _transform(x if signs is None else x * _like(signs, x))


def unrotate(y: jax.Array, signs: np.ndarray | None = None) -> jax.Array:
    """Inverse of `rotate` with the same signs."""
    x = _transform(y.astype(jnp.float32))
    return x if signs is None else x * _like(signs, x)


def _transform(x: jax.Array) -> jax.Array:
    head_dim = x.shape[-1]
    if head_dim <= DENSE_LIMIT or head_dim % 4:
        return jnp.matmul(x, rotation_matrix(head_dim), precision=jax.lax.Precision.HIGHEST)
    halves = _transform(x.reshape(*x.shape[:-1], 2, head_dim // 2))
    low, high = halves[..., 0, :], halves[..., 1, :]
    return jnp.concatenate([low + high, low - high], axis=-1) * np.float32(np.sqrt(0.5))


def _like(vector: np.ndarray, x: jax.Array) -> np.ndarray:
    """Gives a per-channel vector the rank of `x`: the tests make rank promotion an error."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _mixing_matrix(m: int) -> np.ndarray:
    """Symmetric orthonormal `[m, m]` matrix without zeros, m odd (a DCT-II has zeros at odd m).

    Up to m = 5 it is the reflection `I - 2/m J`, beyond that the Hartley transform: whichever
    spreads a spike more evenly (smaller sum of fourth powers).
    """
    if m <= 5:
        return np.eye(m) - 2 / m if m > 1 else np.ones((1, 1))
    angle = 2 * np.pi / m * (np.outer(np.arange(m), np.arange(m)) % m)
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(m)
