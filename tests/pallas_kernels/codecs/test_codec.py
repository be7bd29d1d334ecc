"""Properties of every codec: exact bytes, defined results for awkward input, page means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.codecs import (
    Exact,
    Float8,
    Int8,
    KVCodec,
    MinMax,
    TurboQuant,
    codec_names,
    dequantize_original,
    get_codec,
    page_mean,
)
from pallas_kernels.codecs.factors import load_factor, store_factor

LOSSY = [name for name in codec_names() if name != "exact"]
TENSORS = sorted({c for n in LOSSY for c in (get_codec(n).key, get_codec(n).value)}, key=str)
lossy_tensor = pytest.mark.parametrize("codec", TENSORS, ids=str)


def restore(codec, x):
    return np.asarray(dequantize_original(codec, jax.jit(codec.quantize)(x)))


@lossy_tensor
def test_zero_vector_stays_zero(codec):
    np.testing.assert_array_equal(restore(codec, jnp.zeros((2, 3, 64))), 0)


@lossy_tensor
def test_constant_vector_keeps_its_direction(codec):
    x = np.tile(np.array([[1.0], [-3.5]], np.float32), (1, 64))
    restored = restore(codec, x)
    assert np.all(np.isfinite(restored))
    cosine = (
        np.sum(restored * x, -1) / np.linalg.norm(restored, axis=-1) / np.linalg.norm(x, axis=-1)
    )
    # Without signs Hadamard maps it to a single spike, which a codebook cannot represent.
    spike = isinstance(codec, TurboQuant) and codec.sign_seed is None
    assert np.all(cosine > (0.1 if spike else 0.9))


@lossy_tensor
def test_vectors_of_norm_1e4_keep_their_relative_error(codec):
    x = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    x *= 1e4 / np.linalg.norm(x, axis=-1, keepdims=True)
    error = np.mean((restore(codec, x) - x) ** 2) / np.mean(x**2)
    limit = {2: 0.13, 3: 0.06, 4: 0.015, 8: 0.005}[codec.bits]
    if codec == Float8("e4m3"):
        limit = 0.7  # unscaled: everything over 448 saturates
    assert error < limit


@lossy_tensor
def test_huge_vectors_saturate_and_keep_their_signs(codec):
    sizes = np.array([[1e6], [1e20], [3e38]], np.float32)
    x = np.where(np.arange(64) % 3 == 0, sizes, -sizes)
    restored = restore(codec, x)
    assert np.all(np.isfinite(restored))
    assert np.all(np.mean(restored * np.sign(x), -1) > 100)


@lossy_tensor
def test_tiny_vectors_become_tiny_or_zero(codec):
    sizes = np.array([[1e-45], [1e-40], [1e-38], [1e-30], [1e-20], [1e-9]])
    x = (np.random.default_rng(1).normal(size=(6, 64)) * sizes).astype(np.float32)
    assert np.all(np.abs(restore(codec, x)) < 1e-6)


@lossy_tensor
def test_bad_tokens_are_finite_and_change_no_other(codec):
    x = np.random.default_rng(2).normal(size=(5, 2, 64)).astype(np.float32)
    dirty = x.copy()
    dirty[0, 0], dirty[1, 0, 7], dirty[3, 1], dirty[4, 0, 5] = np.nan, np.nan, -np.inf, np.inf
    clean, spoilt = restore(codec, x), restore(codec, dirty)
    assert np.all(np.isfinite(spoilt))
    np.testing.assert_array_equal(spoilt[0, 0], 0)
    good = np.isfinite(dirty).all(-1)
    np.testing.assert_array_equal(spoilt[good], clean[good])


@lossy_tensor
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_bytes_per_token_counts_what_is_stored(codec, head_dim):
    quantized = codec.quantize(jnp.ones((3, head_dim)))
    assert tuple(f.dtype for f in quantized.factors) == codec.factor_dtypes
    assert quantized.codes.dtype == codec.codes_dtype
    stored = codec.bits * head_dim // 8 + sum(f[0].nbytes for f in quantized.factors)
    assert codec.bytes_per_token(head_dim) == stored


@lossy_tensor
def test_dequantize_is_code_values_times_scale_plus_zero(codec):
    quantized = codec.quantize(np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32))
    scale, zero = codec.factor_values(quantized.factors)
    values = np.asarray(codec.code_values(quantized.codes))
    values = values if scale is None else values * np.asarray(scale)[:, None]
    values = values if zero is None else values + np.asarray(zero)[:, None]
    np.testing.assert_allclose(codec.dequantize(quantized), values, rtol=1e-6, atol=1e-6)


def test_exact_is_the_identity():
    x = jnp.array([[1.5, jnp.nan, -jnp.inf, 3e-40]])
    codec = Exact("float32")
    np.testing.assert_array_equal(codec.quantize(x).codes, x)
    assert (codec.bits, codec.bytes_per_token(64), Exact().bytes_per_token(64)) == (32, 256, 128)


def test_page_mean_is_the_mean_and_ignores_tokens_that_do_not_count():
    x = np.random.default_rng(0).normal(size=(2, 16, 3, 8)).astype(np.float32)
    np.testing.assert_allclose(page_mean(x, axis=1), x.mean(1), atol=1e-3)
    dirty = x.copy()
    dirty[0, 2, 1, 0], dirty[0, 5, 1, 3], dirty[0, 6, 1, 3] = np.nan, np.inf, 1e6
    kept = [i for i in range(16) if i not in (2, 5, 6)]
    mean = page_mean(dirty, axis=-3)
    np.testing.assert_allclose(mean[0, 1], x[0, kept, 1].mean(0), atol=1e-3)
    np.testing.assert_array_equal(mean[1], page_mean(x, axis=1)[1])
    valid = np.broadcast_to((np.arange(16) < 4)[None, :, None], (2, 16, 3))
    np.testing.assert_allclose(page_mean(x, axis=1, valid=valid), x[:, :4].mean(1), atol=1e-3)
    np.testing.assert_array_equal(page_mean(np.full((4, 8), np.nan, np.float32), axis=0), 0)


def test_page_mean_of_values_near_float16s_limit_does_not_overflow():
    assert np.all(np.isfinite(page_mean(jnp.full((64, 8), 65504.0), axis=0)))


def test_a_spoilt_mean_still_gives_finite_vectors():
    codec = get_codec("tq3").key
    mean = jnp.array([jnp.inf, jnp.nan, *[0.0] * 62], jnp.float16)
    assert np.all(np.isfinite(codec.dequantize(codec.quantize(jnp.ones((2, 64)), mean))))


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(key_mean="page", key=TurboQuant(mean=True)), "recent_pages"),
        (dict(key_mean="page"), "disagrees"),
        (dict(key=TurboQuant(mean=True)), "disagrees"),
        (dict(value=TurboQuant(mean=True)), "no mean"),
        (dict(key_mean="token"), "must be None"),
    ],
)
def test_inconsistent_pairs_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        KVCodec(**(dict(name="x", key=Int8(), value=MinMax(4)) | change))


def test_bytes_that_are_no_whole_number_are_refused():
    with pytest.raises(ValueError, match="whole number of bytes"):
        TurboQuant(bits=3).bytes_per_token(20)


def test_ue5m3_is_a_float16_cut_short():
    codes = jnp.arange(0xF8, dtype=jnp.uint8)
    values = load_factor(codes)
    assert np.all(np.isfinite(values)) and np.all(np.diff(values) > 0)
    np.testing.assert_array_equal(store_factor(values, "ue5m3"), codes)
    assert load_factor(store_factor(jnp.array([1e9, 65504.0, 0.0]), "ue5m3")).tolist() == [
        61440,
        61440,
        0,
    ]
    x = np.exp(np.linspace(-9, 11, 4001)).astype(np.float32)
    error = np.asarray(load_factor(store_factor(x, "ue5m3"))) / x - 1
    assert np.abs(error).max() <= 1 / 16 and abs(error.mean()) < 2e-3
