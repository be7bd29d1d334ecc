import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codecs.codebooks import gaussian_mse, get_codebook
from pallas_kernels.codecs.codec import dequantize_original, page_mean
from pallas_kernels.codecs.rotation import channel_signs, rotation_matrix
from pallas_kernels.codecs.turboquant import PRE_SCALES, TurboQuant

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def outliers(tokens, head_dim, seed=0):
    """Vectors whose first four channels are 20 times as large as the others.

    A block-diagonal transform would have all four in one block.
    """
    x = gaussian((tokens, head_dim), seed)
    x[:, :4] *= 20
    return x


def relative_mse(codec, x, mean=None):
    restored = dequantize_original(codec, jax.jit(codec.quantize)(x, mean), mean)
    return float(np.mean((np.asarray(restored) - x) ** 2) / np.mean(x**2))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_on_gaussian_vectors_is_the_codebooks(head_dim, bits):
    codec = TurboQuant(bits=bits, factor="least_squares", sign_seed=0)
    expected = gaussian_mse(get_codebook("cubic", bits))
    ratio = relative_mse(codec, gaussian((2000, head_dim))) / expected
    # Normalised vectors of few dims are a little easier to quantize than N(0, 1).
    assert 1 - 7 / head_dim < ratio < 1.01


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_outlier_channels_do_not_raise_the_error(head_dim):
    codec = TurboQuant(bits=3, factor="least_squares")
    # A block-diagonal transform gives 0.058 here at head_dim 80; Gaussian vectors have 0.0346.
    assert relative_mse(codec, outliers(2000, head_dim)) < 0.036


def test_constant_offset_breaks_plain_hadamard_and_signs_or_mean_mend_it():
    x = gaussian((512, 64)) + 3
    plain = TurboQuant(bits=4)
    assert relative_mse(plain, x) > 0.05
    assert relative_mse(TurboQuant(bits=4, sign_seed=0), x) < 0.012
    centred = TurboQuant(bits=4, mean=True)
    # Relative to x with its offset, which is most of it.
    assert relative_mse(centred, x, page_mean(x, axis=0)) < 0.002


@pytest.mark.parametrize("factor", ["norm", "least_squares", "unbiased"])
@pytest.mark.parametrize("bits", [2, 4])
def test_factors_follow_their_formulas_in_float64(factor, bits):
    x = gaussian((300, 80)) * np.float32(7)
    codec = TurboQuant(bits=bits, factor=factor, sign_seed=5)
    codes, (stored,) = codec.quantize(x)
    y = (channel_signs(80, 5) * x.astype(np.float64)) @ rotation_matrix(80).astype(np.float64)
    c = np.asarray(get_codebook("cubic", bits).levels)[np.asarray(codes)]
    yc, cc, yy = (np.sum(a * b, -1) for a, b in ((y, c), (c, c), (y, y)))
    expected = {"norm": np.sqrt(yy / cc), "least_squares": yc / cc, "unbiased": yy / yc}[factor]
    assert stored.dtype == jnp.float16
    np.testing.assert_allclose(stored, expected, rtol=6e-4)  # float16: 2^-11


def test_each_factor_keeps_its_promise():
    x = gaussian((300, 64))
    restored = {
        factor: np.asarray(
            dequantize_original(c := TurboQuant(bits=2, factor=factor), c.quantize(x))
        )
        for factor in ("norm", "least_squares", "unbiased")
    }
    lengths, own = np.sum(restored["norm"] ** 2, -1), np.sum(x * x, -1)
    np.testing.assert_allclose(lengths, own, rtol=2e-3)
    np.testing.assert_allclose(np.sum(restored["unbiased"] * x, -1), own, rtol=2e-3)
    error = {name: np.sum((value - x) ** 2, -1) for name, value in restored.items()}
    assert np.all(error["least_squares"] <= np.minimum(error["norm"], error["unbiased"]) + 1e-3)


@pytest.mark.parametrize("bits, gain", [(2, 0.985), (3, 0.91), (4, 0.80)])
def test_search_never_lowers_the_cosine_and_lowers_the_error(bits, gain):
    x = gaussian((1000, 64))
    cosines, errors = [], []
    for search in (False, True):
        codec = TurboQuant(bits=bits, factor="least_squares", search=search, sign_seed=0)
        restored = np.asarray(dequantize_original(codec, codec.quantize(x)), np.float64)
        lengths = np.linalg.norm(restored, axis=-1) * np.linalg.norm(x, axis=-1)
        cosines.append(np.sum(restored * x, -1) / lengths)
        errors.append(np.mean((restored - x) ** 2))
    assert np.all(cosines[1] >= cosines[0] - 1e-6)
    assert errors[1] < gain * errors[0]


def test_search_includes_plain_rounding():
    assert 1.0 in PRE_SCALES


def test_codes_are_those_of_the_published_scheme():
    x = gaussian((50, 128))
    codes = TurboQuant(bits=3, codebook="lloyd_max").quantize(x).codes
    y = x.astype(np.float64) @ rotation_matrix(128)
    z = y * np.sqrt(128) / np.linalg.norm(y, axis=-1, keepdims=True)
    thresholds = np.asarray(get_codebook("lloyd_max", 3).thresholds)
    expected = np.searchsorted(thresholds, z)
    clear = np.abs(z[..., None] - thresholds).min(-1) > 1e-5  # codes may differ at a threshold
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(np.asarray(codes)[clear], expected[clear])


def test_scores_need_no_inverse_rotation():
    q, k = gaussian((2, 40, 64))
    codec = TurboQuant(bits=4, factor="unbiased", search=True, sign_seed=0, mean=True)
    mean = page_mean(k, axis=0)
    quantized = codec.quantize(k, mean)
    rotated = (
        codec.rotate(q) @ codec.dequantize(quantized).T + q @ mean.astype(jnp.float32)[:, None]
    )
    np.testing.assert_allclose(
        rotated, q @ dequantize_original(codec, quantized, mean).T, atol=2e-4
    )


def test_eight_bit_factors_cost_little_error():
    x = gaussian((2000, 64)) * np.exp(gaussian((2000, 1), 1) * 3)  # lengths over many octaves
    half, byte = (
        TurboQuant(bits=2, factor="least_squares", factor_kind=kind).quantize(x)
        for kind in ("float16", "ue5m3")
    )
    codec = TurboQuant(bits=2)
    assert byte.factors[0].dtype == jnp.uint8
    ratio = np.asarray(codec.factor_values(byte.factors)[0] / codec.factor_values(half.factors)[0])
    assert np.abs(ratio - 1).max() < 1 / 15
    assert np.mean((ratio - 1) ** 2) < 8e-4


def test_quantize_is_the_same_for_any_batch_and_jit():
    x = gaussian((6, 4, 64))
    codec = TurboQuant(bits=4, factor="unbiased", search=True, sign_seed=0)
    whole = jax.jit(codec.quantize)(x)
    single = [codec.quantize(x[i]) for i in range(6)]
    same = np.mean(np.asarray(whole.codes) == np.stack([s.codes for s in single]))
    assert same > 0.995  # a different summation order may turn a tie of the search
    np.testing.assert_allclose(
        whole.factors[0].astype(jnp.float32),
        np.stack([s.factors[0] for s in single]).astype(np.float32),
        rtol=5e-3,
    )


@pytest.mark.parametrize(
    "bad",
    [dict(bits=5), dict(bits=3, codebook="quintic"), dict(factor="none"), dict(factor_kind="bf16")],
)
def test_impossible_options_are_refused(bad):
    with pytest.raises(ValueError):
        TurboQuant(**bad)


def test_a_mean_that_would_be_forgotten_is_refused():
    with pytest.raises(ValueError, match="a mean was given"):
        TurboQuant().quantize(jnp.ones((2, 64)), jnp.zeros(64))


def test_codec_is_a_static_argument():
    quantize = functools.partial(jax.jit, static_argnums=0)(lambda codec, x: codec.quantize(x))
    quantize(TurboQuant(bits=4), jnp.ones((2, 64)))
    quantize(TurboQuant(bits=4), jnp.ones((2, 64)))
    assert quantize._cache_size() == 1
