"""MXFP4 against a table made from the OCP MX specification's definition of its two formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import mxfp4


def spec_value(code: int) -> float:
    """E2M1: sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def spec_dequantize(blocks, scales):
    """In float64, value by value."""
    out = np.empty((*scales.shape, 32))
    for place in np.ndindex(*scales.shape):
        scale = np.nan if scales[place] == 255 else 2.0 ** (int(scales[place]) - 127)
        for i, byte in enumerate(blocks[place].tolist()):
            out[place][2 * i : 2 * i + 2] = (
                spec_value(byte & 15) * scale,
                spec_value(byte >> 4) * scale,
            )
    return out.reshape(*scales.shape[:-1], -1)


def every_byte_and_scale():
    """A row for each scale; every byte stands in every row."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (256, 1, 1))
    return blocks, np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_byte_at_every_scale_is_exact(dtype):
    blocks, scales = every_byte_and_scale()
    got = np.asarray(jax.jit(mxfp4.dequantize, static_argnums=2)(blocks, scales, dtype), np.float64)
    expected = spec_dequantize(blocks, scales)
    expected[np.abs(expected) >= 2.0**128] *= np.inf  # past either type's range
    normal = ~(np.abs(expected) < 2.0**-126) & (scales[:, :1] > 0)  # XLA flushes the others
    np.testing.assert_array_equal(got[normal], expected[normal])
    assert np.all(got[~normal] == 0) and np.all(np.abs(expected[~normal]) <= 6 * 2.0**-127)
    np.testing.assert_array_equal(np.signbit(got[1:255]), np.signbit(expected[1:255]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_multiply_is_the_product_with_the_dequantized_matrix(dtype):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (7, 3, 16), dtype=np.uint8)
    scales = rng.integers(110, 130, (7, 3), dtype=np.uint8)
    x = jnp.asarray(rng.standard_normal((96, 5)), dtype)
    expected = spec_dequantize(blocks, scales) @ np.asarray(x, np.float64)
    got = jax.jit(mxfp4.multiply)(blocks, scales, x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("scale", range(16, 255))
def test_multiply_works_at_every_usual_scale(scale):
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
    scales = np.full((16, 1), scale, np.uint8)
    x = np.full((32, 1), 2.0 ** max(120 - scale, -120), np.float32)  # keeps sums in range
    expected = spec_dequantize(blocks, scales) @ x.astype(np.float64)
    np.testing.assert_array_equal(
        np.asarray(mxfp4.multiply(blocks, scales, x), np.float64), expected
    )
