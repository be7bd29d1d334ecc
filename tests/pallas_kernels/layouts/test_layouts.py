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
    Quantized,
    TokenMajor,
    TokensOnLanes,
    TurboQuant,
    codec_names,
    default_layout,
    get_codec,
)
from pallas_kernels.codecs.presets import exact_codec
from pallas_kernels.layouts.packing import unpack_planes
from pallas_kernels.layouts.page_layout import MAX_WASTE
from pallas_kernels.layouts.plain import Plain

PLATFORMS = ("cpu", "gpu", "tpu")
# TPUs: 2- and 3-bit codes of 80 dims do not fill 32-bit words, and 3 heads waste rows of a tile.
REFUSED = [(name, 8, 80) for name in ("k3v4_nc", "3bit_nc", "tq3", "tq2")]
REFUSED += [(name, 3, 64) for name in ("k8v4", "4bit_nc", "k3v4_nc", "3bit_nc", "tq3", "tq2")]


def random_record(codec, shape, seed):
    """A record of random codes and factor bits, not only those that `quantize` would give."""
    rng = np.random.default_rng(seed)
    raw = lambda dtype, shape: jnp.asarray(
        rng.integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
    )
    codes = raw(codec.codes_dtype, shape)
    if codes.dtype == jnp.bfloat16:  # CPUs that convert bfloat16 themselves keep no NaN's payload
        codes = jnp.where(jnp.isnan(codes), jnp.bfloat16(1), codes)
    if codec.bits < 8:
        codes = codes & np.uint8(2**codec.bits - 1)
    return Quantized(codes, tuple(raw(dtype, shape[:-1]) for dtype in codec.factor_dtypes))


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kv_heads, head_dim", [(8, 96), (3, 64), (8, 80)])
def test_pages_round_trip_within_the_waste(name, platform, kv_heads, head_dim):
    codec, page_size = get_codec(name), 128 if platform == "tpu" else 64
    try:
        layout = default_layout(
            codec, platform=platform, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size
        )
    except ValueError as error:
        assert platform == "tpu" and (name, kv_heads, head_dim) in REFUSED, error
        return
    assert layout.allocated_bytes(kv_heads) <= MAX_WASTE * layout.useful_bytes(kv_heads)
    shape = (2, kv_heads, page_size, head_dim)
    key, value = random_record(codec.key, shape, 0), random_record(codec.value, shape, 1)
    arrays = jax.jit(layout.pack)(key, value)
    assert {n: (a.shape[1:], a.dtype) for n, a in arrays.items()} == {
        n: (s.shape, s.dtype) for n, s in layout.arrays(kv_heads).items()
    }
    assert layout.kv_heads(arrays) == kv_heads
    assert sum(a[0].nbytes for a in arrays.values()) == layout.allocated_bytes(kv_heads)
    assert_same_bits(jax.jit(layout.unpack)(arrays), (key, value))


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 512])
def test_token_major_allocates_exactly_what_the_codec_counts(name, platform, head_dim):
    layout = default_layout(
        get_codec(name), platform=platform, kv_heads=3, head_dim=head_dim, page_size=64
    )
    assert layout.allocated_bytes(3) == layout.useful_bytes(3)


@pytest.mark.parametrize("name", ["4bit_nc", "tq3", "k8v4", "exact"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_one_token_writes_into_its_place(name, platform):
    codec, page = get_codec(name), 128 if platform == "tpu" else 64
    layout = default_layout(codec, platform=platform, kv_heads=4, head_dim=64, page_size=page)
    shape = (4, page, 64)
    key, value = random_record(codec.key, shape, 0), random_record(codec.value, shape, 1)
    pages = layout.pack(key, value)
    take = lambda r: Quantized(r.codes[:, 9:10], tuple(f[:, 9:10] for f in r.factors))
    single = layout.pack(take(key), take(value))
    for array, axis in layout.token_axes.items():
        slot = jax.lax.slice_in_dim(pages[array], 9, 10, axis=pages[array].ndim + axis)
        assert_same_bits(single[array], slot)


SHORT = TurboQuant(factor_kind="ue5m3")


@pytest.mark.parametrize(
    "key, value, words",
    [
        (Float8("e4m3"), Float8("e4m3"), {}),
        (Float8("e4m3"), Int8(), {"float16": 1}),
        (Float8("e4m3"), MinMax(4), {"uint32": 1}),
        (TurboQuant(), TurboQuant(), {"uint32": 1}),
        (TurboQuant(), MinMax(4), {"float16": 1, "uint32": 1}),
        (MinMax(8), Int8(), {"float16": 1, "uint32": 1}),
        (MinMax(4), MinMax(4), {"uint32": 2}),
        (SHORT, SHORT, {"uint16": 1}),
        (SHORT, Int8(), {"uint8": 1, "float16": 1}),
        (SHORT, MinMax(4), {"uint8": 1, "uint32": 1}),
        (MinMax(4), SHORT, {"uint8": 1, "uint32": 1}),
    ],
)
def test_factors_of_a_token_share_words(key, value, words):
    codec = KVCodec(name="own", key=key, value=value)
    layout = TokenMajor(codec=codec, head_dim=64, page_size=16, word_bits=16)
    assert {n: s for n, s in layout.arrays(3).items() if n.startswith("factors")} == {
        f"factors_{dtype}": jax.ShapeDtypeStruct((rows, 3, 16), dtype)
        for dtype, rows in words.items()
    }
    assert layout.allocated_bytes(3) == layout.useful_bytes(3)
    shape = (2, 3, 16, 64)
    record = random_record(key, shape, 0), random_record(value, shape, 1)
    assert_same_bits(layout.unpack(layout.pack(*record)), record)


@pytest.mark.parametrize(
    "name, alone, pair",
    [
        ("int8", ["factors_float16"], ["factors_uint32"]),
        ("tq4", [], ["factors_uint32"]),
        ("tq2", [], ["factors_uint16"]),
    ],
)
def test_the_first_factor_stands_alone_and_pairs_begin_low(name, alone, pair):
    codec = get_codec(name)
    layout = TokenMajor(codec=codec, head_dim=64, page_size=16, word_bits=16)
    shape = (2, 16, 64)
    key, value = random_record(codec.key, shape, 0), random_record(codec.value, shape, 1)
    arrays = {n: np.asarray(x) for n, x in layout.pack(key, value).items()}
    size = key.factors[0].dtype.itemsize
    bits = [np.asarray(f).view(f"u{size}").astype(int) for f in (*key.factors, *value.factors)]
    for array in alone:
        np.testing.assert_array_equal(arrays[array][0].view(f"u{size}"), bits.pop(0))
    for array in pair:
        np.testing.assert_array_equal(arrays[array][0], bits[0] | bits[1] << 8 * size)


def test_gpu_words_are_chosen_by_head_dim():
    layout = lambda d, name="tq4": default_layout(
        get_codec(name), platform="gpu", kv_heads=8, head_dim=d, page_size=64
    )
    assert layout(128).arrays(8)["k_codes"] == jax.ShapeDtypeStruct((8, 64, 16), jnp.uint32)
    assert layout(64).arrays(8)["k_codes"] == jax.ShapeDtypeStruct((8, 64, 16), jnp.uint16)
    assert layout(128, "tq3").arrays(8)["k_high"] == jax.ShapeDtypeStruct((8, 64, 8), jnp.uint16)
    assert layout(128, "int8").arrays(8)["v_codes"] == jax.ShapeDtypeStruct((8, 64, 64), jnp.uint16)
    assert layout(112, "tq3").arrays(8)["v_high"] == jax.ShapeDtypeStruct((8, 64, 7), jnp.uint16)


def test_tpu_page_is_words_then_meta_as_the_notes_say():
    codec = get_codec("4bit_nc")
    layout = TokensOnLanes(codec=codec, head_dim=128)
    assert layout.arrays(8) == {
        "codes": jax.ShapeDtypeStruct((8 * 128 // 4, 128), jnp.uint32),
        "meta": jax.ShapeDtypeStruct((16, 128), jnp.uint32),
    }
    shape = (8, 128, 128)
    key, value = random_record(codec.key, shape, 0), random_record(codec.value, shape, 1)
    arrays = layout.pack(key, value)
    head, token, row = 3, 17, 5
    word = int(arrays["codes"][head * 32 + row, token])
    nibbles = [((word >> (4 * j)) & 15) ^ 8 for j in range(8)]
    np.testing.assert_array_equal(nibbles, key.codes[head, token, 8 * row : 8 * row + 8])
    word = int(arrays["codes"][head * 32 + 16 + row, token])
    assert (word & 15) ^ 8 == int(value.codes[head, token, 8 * row])
    bits = lambda x: int(np.asarray(x)[head, token].view(np.uint16))
    meta = arrays["meta"][2 * head : 2 * head + 2, token]
    assert int(meta[0]) == bits(value.factors[0]) << 16 | bits(key.factors[0])
    assert int(meta[1]) == bits(value.factors[1])


def test_transfer_between_layouts_keeps_the_record():
    codec = get_codec("tq2")
    lanes = TokensOnLanes(codec=codec, head_dim=64)
    words = TokenMajor(codec=codec, head_dim=64, page_size=128, word_bits=16)
    shape = (8, 128, 64)
    record = random_record(codec.key, shape, 0), random_record(codec.value, shape, 1)
    assert_same_bits(words.unpack(words.pack(*lanes.unpack(lanes.pack(*record)))), record)


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda: TokensOnLanes(codec=get_codec("tq4"), head_dim=80).check_waste(1), "useful ones"),
        (lambda: TokensOnLanes(codec=get_codec("tq3"), head_dim=80), "multiple of 32"),
        (
            lambda: TokensOnLanes(codec=get_codec("tq4"), head_dim=64, page_size=64),
            "page_size=64",
        ),
        (
            lambda: TokenMajor(codec=get_codec("tq3"), head_dim=20, page_size=64),
            "multiple of 8",
        ),
        (
            lambda: TokensOnLanes(
                codec=KVCodec(name="mixed", key=Exact(), value=Int8()), head_dim=64
            ),
            "exact tensor",
        ),
        (
            lambda: default_layout(
                get_codec("tq4"), platform="npu", kv_heads=8, head_dim=64, page_size=64
            ),
            "platform='npu'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_built(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_quantized_page_survives_the_layout():
    codec = get_codec("tq4")
    x = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    layout = TokenMajor(codec=codec, head_dim=64, page_size=64)
    key, value = codec.key.quantize(x), codec.value.quantize(x)
    arrays = layout.pack(key, value)
    np.testing.assert_array_equal(unpack_planes((arrays["k_codes"],), 4), key.codes)
    restored, _ = layout.unpack(arrays)
    np.testing.assert_array_equal(codec.key.dequantize(restored), codec.key.dequantize(key))


def test_plain_pages_hold_values_as_they_are():
    layout = Plain(codec=exact_codec("float32"), head_dim=20, page_size=8)
    key = random_record(Exact("float32"), (5, 3, 8, 20), 0)
    value = random_record(Exact("float32"), (5, 3, 8, 20), 1)
    arrays = layout.pack(key, value)
    np.testing.assert_array_equal(arrays["k"], key.codes)
    assert_same_bits(layout.unpack(arrays), (key, value))
    assert layout.kv_heads(arrays) == 3
    assert layout.allocated_bytes(3) == layout.useful_bytes(3) == 2 * 3 * 8 * 20 * 4
    with pytest.raises(ValueError, match="^codec='tq4' must be exact"):
        Plain(codec=get_codec("tq4"), head_dim=64, page_size=8)
