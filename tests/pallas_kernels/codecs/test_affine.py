import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codecs.affine import Float8, Int8, MinMax


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_min_max_is_off_by_at_most_half_a_step(bits):
    x = gaussian((200, 64)) * 5 + 2
    codec = MinMax(bits)
    quantized = jax.jit(codec.quantize)(x)
    step = (x.max(-1) - x.min(-1)) / (2**bits - 1)
    error = np.abs(np.asarray(codec.dequantize(quantized)) - x).max(-1)
    slack = 1e-3 * np.abs(x).max(-1) * 2  # float16 scale and zero
    assert np.all(error <= step / 2 + slack)
    assert [f.dtype for f in quantized.factors] == [jnp.float16, jnp.float16]
    assert quantized.codes.max() == 2**bits - 1 and quantized.codes.min() == 0


def test_min_max_hand_written_case():
    codes, (scale, zero) = MinMax(2).quantize(jnp.array([[-1.0, 0.2, 0.9, 2.0]]))
    np.testing.assert_array_equal(codes, [[0, 1, 2, 3]])
    assert (scale, zero) == (1.0, -1.0)


def test_min_max_keeps_a_constant_vector():
    codec = MinMax(4)
    np.testing.assert_array_equal(codec.dequantize(codec.quantize(jnp.full((3, 16), 0.75))), 0.75)


def test_int8_scales_by_the_largest_magnitude():
    x = gaussian((100, 64)) * 3
    codec = Int8()
    codes, (scale,) = codec.quantize(x)
    np.testing.assert_allclose(scale, np.abs(x).max(-1) / 127, rtol=6e-4)
    assert np.all(np.abs(codes.astype(jnp.int32)).max(-1) == 127)
    error = np.abs(np.asarray(codec.dequantize(codec.quantize(x))) - x)
    assert np.all(error <= np.asarray(scale, np.float32)[:, None] * 0.57)  # 0.5 and float16's share


@pytest.mark.parametrize("format, limit, ulp", [("e4m3", 448, 2**-4), ("e5m2", 57344, 2**-3)])
def test_float8_rounds_to_nearest_and_saturates(format, limit, ulp):
    codec = Float8(format)
    x = gaussian((50, 64))
    restored = codec.dequantize(codec.quantize(x))
    np.testing.assert_allclose(restored, x, rtol=ulp, atol=2**-10)
    edges = jnp.array([[limit, limit * 1.2, 1e38, jnp.inf, -jnp.inf, jnp.nan, -1e30, 0.0]])
    np.testing.assert_array_equal(
        codec.dequantize(codec.quantize(edges)),
        [[limit, limit, limit, limit, -limit, 0, -limit, 0]],
    )


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="must be 2, 3, 4 or 8"):
        MinMax(5)
    with pytest.raises(ValueError, match="'e4m3' or 'e5m2'"):
        Float8("e3m4")  # pyright: ignore[reportArgumentType]
