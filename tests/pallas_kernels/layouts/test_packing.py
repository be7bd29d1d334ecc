import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.layouts.packing import (
    check_packable,
    pack_float16_pairs,
    pack_planes,
    pack_runs,
    unpack_float16_pairs,
    unpack_planes,
    unpack_runs,
)

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256, 512)


def word_dims(head_dim, width, word_bits, *, runs=False):
    """The dim in each field, `i32[words, fields]`: the order in which words hold them."""
    fields = word_bits // width
    shape = (head_dim // fields, fields) if runs else (fields, head_dim // fields)
    dims = np.arange(head_dim, dtype=np.int32).reshape(shape)
    return dims if runs else dims.T


def random_codes(shape, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@settings(deadline=None, max_examples=25)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    word_bits=st.sampled_from([8, 16, 32]),
    head_dim=st.sampled_from(HEAD_DIMS),
    lead=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 99),
)
def test_planes_round_trip_and_store_exactly_the_bits(bits, word_bits, head_dim, lead, seed):
    codes = random_codes((*lead, head_dim), bits, seed)
    if head_dim * (1 if bits == 3 else bits) % word_bits:
        with pytest.raises(ValueError, match="must be a multiple"):
            check_packable(head_dim, bits, word_bits)
        return
    words = pack_planes(codes, bits, word_bits)
    assert sum(w.nbytes for w in words) * 8 == codes.size * bits
    np.testing.assert_array_equal(unpack_planes(words, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_runs_round_trip_and_store_exactly_the_bits(bits, head_dim):
    codes = random_codes((2, 3, head_dim), bits)
    words = jax.jit(pack_runs, static_argnums=1)(codes, bits)
    assert sum(w.nbytes for w in words) * 8 == codes.size * bits
    np.testing.assert_array_equal(jax.jit(unpack_runs, static_argnums=1)(words, bits), codes)


@pytest.mark.parametrize("word_bits", [8, 16, 32])
def test_plane_p_of_word_c_is_dim_p_times_words_plus_c(word_bits):
    codes = random_codes((64,), 4)
    (words,) = pack_planes(codes, 4, word_bits)
    dims = word_dims(64, 4, word_bits)
    count = 64 * 4 // word_bits
    assert dims[3, 1] == count + 3
    for c in range(count):
        expected = sum(int(codes[dims[c, p]]) << (4 * p) for p in range(word_bits // 4))
        assert int(words[c]) == expected


def test_three_bits_are_the_low_two_and_the_high_one():
    codes = random_codes((64,), 3)
    low, high = pack_planes(codes, 3, 16)
    np.testing.assert_array_equal(unpack_planes((low,), 2), codes & 3)
    bits = (np.asarray(high)[:, None] >> np.arange(16, dtype=np.uint16)) & np.uint16(1)
    np.testing.assert_array_equal(
        bits[word_dims(64, 1, 16) >= 0].reshape(4, 16).T.ravel(), codes >> 2
    )


def test_run_word_widens_like_int4_of_code_less_8():
    codes = random_codes((64,), 4)
    (words,) = pack_runs(codes, 4)
    np.testing.assert_array_equal(word_dims(64, 4, 32, runs=True)[2], np.arange(16, 24))
    for r, word in enumerate(np.asarray(words)):
        nibbles = [(int(word) >> (4 * j)) & 15 for j in range(8)]
        signed = [n - 16 if n > 7 else n for n in nibbles]
        np.testing.assert_array_equal(signed, codes[8 * r : 8 * r + 8].astype(int) - 8)


def test_runs_are_what_bitcast_to_int4_reads():
    codes = random_codes((4, 64), 4)
    (words,) = pack_runs(codes, 4)
    int4 = jax.lax.bitcast_convert_type(words, jnp.int4).reshape(4, 64)
    np.testing.assert_array_equal(int4.astype(jnp.int8), codes.astype(np.int8) - 8)


def test_float16_pairs_keep_every_bit():
    bits = np.arange(0, 65536, 7, dtype=np.uint16)
    low, high = bits.view(np.float16), bits[::-1].view(np.float16)
    words = pack_float16_pairs(jnp.asarray(low), jnp.asarray(high))
    assert words.dtype == jnp.uint32
    for half, expected in zip(
        unpack_float16_pairs(words, jnp.float16, jnp.float16), (low, high), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(half).view(np.uint16), expected.view(np.uint16))


def test_unknown_widths_are_refused():
    with pytest.raises(ValueError, match="bits=5 must be one of"):
        check_packable(64, 5, 8)
    with pytest.raises(ValueError, match="word_bits=64 must be one of"):
        check_packable(64, 4, 64)
