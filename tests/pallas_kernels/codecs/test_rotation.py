import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codecs.rotation import channel_signs, rotate, rotation_matrix, unrotate

HEAD_DIMS = (2, 6, 16, 24, 32, 64, 80, 96, 112, 128, 192, 256, 320, 512)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_orthonormal_symmetric_and_mixes_every_channel(head_dim):
    matrix = rotation_matrix(head_dim).astype(np.float64)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix @ matrix, np.eye(head_dim), atol=2e-7)
    assert np.abs(matrix).min() * head_dim**0.5 > 0.1  # no zeros: each channel reaches all


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seed", [None, 0])
def test_rotate_matches_float64_matrix_and_unrotate_inverts(head_dim, seed):
    x = np.random.default_rng(head_dim).normal(size=(3, 5, head_dim)).astype(np.float32)
    signs = channel_signs(head_dim, seed)
    y = jax.jit(lambda x: rotate(x, signs))(x)
    expected = (signs * x.astype(np.float64)) @ rotation_matrix(head_dim).astype(np.float64)
    np.testing.assert_allclose(y, expected, atol=5e-6)
    np.testing.assert_allclose(unrotate(y, signs), x, atol=5e-6)


def test_power_of_two_rotation_is_the_hadamard_matrix():
    expected = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    np.testing.assert_allclose(rotation_matrix(4), expected, atol=1e-7)


def test_rotation_keeps_dot_products():
    q, k = np.random.default_rng(0).normal(size=(2, 7, 112)).astype(np.float32)
    signs = channel_signs(112, 3)
    products = np.sum(np.asarray(rotate(q, signs)) * np.asarray(rotate(k, signs)), -1)
    np.testing.assert_allclose(products, np.sum(q * k, -1), atol=1e-5)


def test_signs_are_pinned_balanced_and_differ_by_seed():
    signs = channel_signs(64, 0)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.sum()) < 24
    assert "".join("+" if s > 0 else "-" for s in signs[:16]) == "-++++--+-++++++-"
    assert not np.array_equal(signs, channel_signs(64, 1))
    np.testing.assert_array_equal(channel_signs(64, None), np.ones(64))


@pytest.mark.parametrize("head_dim", [0, 63])
def test_odd_head_dim_is_refused(head_dim):
    with pytest.raises(ValueError, match="must be even"):
        rotation_matrix(head_dim)


def test_half_precision_input_is_rotated_in_float32():
    x = jnp.ones((2, 64), jnp.bfloat16)
    assert rotate(x).dtype == jnp.float32
