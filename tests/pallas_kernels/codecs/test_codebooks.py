import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codecs.codebooks import gaussian_mse, get_codebook

ALL = [(n, b) for n in ("lloyd_max", "cubic") for b in (2, 3, 4)] + [("quintic", 4)]
# Centroids as published by Max (1960), to four decimals, of which the last is uncertain.
CENTROIDS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
LLOYD_MAX_MSE = {2: 0.117482, 3: 0.034548, 4: 0.009501}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_levels_are_the_published_centroids(bits):
    levels = get_codebook("lloyd_max", bits).levels
    np.testing.assert_allclose(levels[2 ** (bits - 1) :], CENTROIDS[bits], atol=1.5e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_levels_are_the_mean_of_their_cells(bits):
    codebook = get_codebook("lloyd_max", bits)
    x = np.linspace(-12, 12, 2_400_001)
    pdf = np.exp(-x * x / 2)
    cell = np.searchsorted(codebook.thresholds, x)
    mean = np.bincount(cell, pdf * x) / np.bincount(cell, pdf)
    np.testing.assert_allclose(codebook.levels, mean, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_mse_is_the_published_one_within_1e_4(bits):
    mse = gaussian_mse(get_codebook("lloyd_max", bits))
    assert mse == pytest.approx(LLOYD_MAX_MSE[bits], rel=1e-4)


@pytest.mark.parametrize(
    "name, bits, loss",
    [("cubic", 2, 0), ("cubic", 3, 0.002), ("cubic", 4, 0.020), ("quintic", 4, 0.002)],
)
def test_polynomial_mse_is_what_design_says(name, bits, loss):
    ratio = gaussian_mse(get_codebook(name, bits)) / gaussian_mse(get_codebook("lloyd_max", bits))
    assert ratio - 1 == pytest.approx(loss, abs=6e-4)  # `loss` is rounded to 0.1 per cent


@pytest.mark.parametrize("name, bits", ALL)
def test_closed_form_mse_agrees_with_quadrature(name, bits):
    codebook = get_codebook(name, bits)
    x = np.linspace(-10, 10, 2_000_001)
    error = x - np.asarray(codebook.levels)[np.searchsorted(codebook.thresholds, x)]
    integral = np.sum(error**2 * np.exp(-x * x / 2)) * (x[1] - x[0]) / np.sqrt(2 * np.pi)
    assert gaussian_mse(codebook) == pytest.approx(integral, rel=1e-6)


@pytest.mark.parametrize(
    "bits, coefficients",
    [(2, (0.892887, 0.0506925)), (3, (0.471455, 0.0115849)), (4, (0.240507, 0.00209753))],
)
def test_cubic_levels_follow_the_centred_code(bits, coefficients):
    a, b = coefficients
    t = np.arange(2**bits) - (2**bits - 1) / 2
    np.testing.assert_allclose(get_codebook("cubic", bits).levels, a * t + b * t**3, rtol=1e-12)


@pytest.mark.parametrize("name, bits", ALL)
def test_decode_gives_the_levels_and_encode_inverts_it(name, bits):
    codebook = get_codebook(name, bits)
    codes = jnp.arange(2**bits, dtype=jnp.uint8)
    levels = jax.jit(codebook.decode)(codes)
    np.testing.assert_allclose(levels, codebook.levels, rtol=3e-7)
    np.testing.assert_array_equal(codebook.encode(levels), codes)
    assert all(a < b for a, b in zip(codebook.levels[:-1], codebook.levels[1:], strict=True))


@pytest.mark.parametrize("name, bits", ALL)
def test_encode_picks_the_nearest_level(name, bits):
    codebook = get_codebook(name, bits)
    x = np.random.default_rng(bits).normal(size=(5, 999)).astype(np.float32) * 1.5
    levels = np.asarray(codebook.levels)
    chosen = levels[np.asarray(jax.jit(codebook.encode)(x))]
    best = np.abs(x[..., None] - levels).min(-1)
    np.testing.assert_allclose(np.abs(x - chosen), best, atol=1e-6)


def test_extreme_input_gets_an_outer_code_and_nan_an_inner_one():
    codes = get_codebook("cubic", 3).encode(
        jnp.array([-jnp.inf, -1e30, 0.0, 1e30, jnp.inf, jnp.nan])
    )
    np.testing.assert_array_equal(codes, [0, 0, 4, 7, 7, 4])


@pytest.mark.parametrize(
    "name, bits", [("quintic", 3), ("cubic", 5), ("uniform", 4), ("lloyd_max", 8)]
)
def test_unknown_codebooks_are_refused(name, bits):
    with pytest.raises(ValueError, match="no such codebook"):
        get_codebook(name, bits)


def test_codebooks_are_hashable_and_equal_by_value():
    assert len({get_codebook("cubic", 4), get_codebook("cubic", 4), get_codebook("cubic", 3)}) == 2
