"""The GPU kernel on coded pages equals the dense formula on the dequantized keys and values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codecs.affine import Int8, MinMax
from pallas_kernels.codecs.codec import KVCodec
from pallas_kernels.codecs.presets import get_codec
from pallas_kernels.codecs.turboquant import TurboQuant
from pallas_kernels.rule import Rule
from tests.helpers import AS_USERS
from tests.pallas_kernels.paged_attention.paged_cases import (
    KERNEL_STATIC,
    LAYERS,
    call_kernel,
    on_the_device,
)
from tests.pallas_kernels.paged_attention.triton.kernel_cases import (
    TRANSPOSED,
    assert_close,
    make_case,
)


def own(key, value):
    return KVCodec(name="own", key=key, value=value)


LLOYD = functools.partial(TurboQuant, codebook="lloyd_max")
CODECS = {
    name: get_codec(name)
    for name in ("int8 fp8_e4m3 fp8_e5m2 k8v4 4bit_nc k3v4_nc 3bit_nc tq4 tq3 tq2".split())
} | {
    "quintic_v2": own(TurboQuant(codebook="quintic"), MinMax(2)),
    "lloyd2_lloyd4": own(LLOYD(bits=2), LLOYD(bits=4)),
    "minmax4_minmax8": own(MinMax(4), MinMax(8)),
    "minmax3_int8": own(MinMax(3), Int8()),
}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_codecs_equal_dense(codec, interpret):
    case = make_case(codec, lengths=(1, 33, 130), q_lens=(1, 1, 0))
    options = (
        dict(rule=Rule(window=70), soft_cap=3.0) if codec.name in ("tq4", "k8v4", "tq2") else {}
    )
    got = case.attend_kernel(interpret=interpret, **options)
    assert_close(got, case.dense(**options), codec)


@pytest.mark.both_pythons
@pytest.mark.parametrize("lookups", ["k", ""])
def test_levels_are_looked_up_or_computed(lookups, interpret):
    case = make_case("tq3", lengths=(1, 70), page_size=32)
    config = dataclasses.replace(TRANSPOSED, lookups=lookups)
    assert_close(case.attend_kernel(interpret=interpret, config=config), case.dense(), "tq3")


SHAPES = [
    ("3bit_nc", dict(head_dim=80, group=1)),
    ("tq3", dict(head_dim=96, group=7, page_size=32)),
    ("3bit_nc", dict(head_dim=128, group=4, page_size=64, word_bits=32)),
    ("3bit_nc", dict(head_dim=192, group=2, page_size=128, word_bits=32)),
    ("3bit_nc", dict(head_dim=256, group=16, kv_heads=1)),
]


@pytest.mark.parametrize("codec, shape", SHAPES, ids=str)
def test_shapes(codec, shape, interpret):
    case = make_case(codec, lengths=(1, 70, 129), **shape)
    assert_close(case.attend_kernel(interpret=interpret, config=TRANSPOSED), case.dense(), codec)


def test_one_mean_serves_all_pages(interpret):
    """Results are equal bit by bit, so both programs are compiled without special options."""
    case = make_case("tq4", lengths=(1, 150))
    shape = case.pages.key_mean.shape
    rng = np.random.default_rng(1)
    one = jnp.asarray(rng.standard_normal((LAYERS, 1, *shape[2:])), jnp.float16)
    attend = jax.jit(call_kernel, static_argnames=KERNEL_STATIC, compiler_options=AS_USERS)

    def attend_with(means):
        pages = dataclasses.replace(case.pages, key_mean=means)
        arguments = dataclasses.replace(case, pages=pages).arguments
        with on_the_device():
            return attend(*arguments, config=None, interpret=interpret)

    got, want = attend_with(one), attend_with(jnp.broadcast_to(one, shape))
    np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("word_bits", [16, 32])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "k8v4", "4bit_nc", "tq4", "tq3", "tq2"])
def test_word_sizes_at_128(name, word_bits, interpret):
    shape = dict(page_size=64, head_dim=128, word_bits=word_bits)
    case = make_case(name, lengths=(65, 300), q_lens=(2, 1), **shape)
    assert_close(case.attend_kernel(interpret=interpret), case.dense(), name)


@pytest.mark.parametrize("codec", [get_codec("int8"), own(Int8(), MinMax(8))], ids=["u8", "i8"])
def test_bytes_that_are_not_packed(codec, interpret):
    case = make_case(codec, lengths=(1, 33, 130), q_lens=(1, 1, 0), word_bits=8)
    assert_close(case.attend_kernel(interpret=interpret), case.dense(), codec)
