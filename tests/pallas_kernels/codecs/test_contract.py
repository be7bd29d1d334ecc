"""`check_codec` passes every codec that we have, and names the rule that a broken one breaks."""

import dataclasses
import functools
from dataclasses import dataclass

import jax.numpy as jnp
import pytest

import jaxkv
from jaxkv.codecs import (
    Codebook,
    KVCodec,
    MinMax,
    Quantized,
    TensorCodec,
    TurboQuant,
    check_codec,
    codec_names,
    get_codec,
)


@pytest.mark.parametrize("name", codec_names())
def test_every_preset_keeps_the_rules(name):
    check_codec(get_codec(name))


def test_a_head_dim_that_is_no_power_of_two():
    check_codec(get_codec("tq3"), head_dim=96)


@dataclass(frozen=True)
class Halves(TensorCodec):
    """Codes 0 to 15 with a table of levels, one scale; the fields break a rule each."""

    always_finite = True
    bits = 4
    factor_dtypes = (jnp.dtype("float16"),)
    breaks: str = ""

    def quantize(self, x, mean=None):
        del mean
        clean = x if self.breaks == "nan" else jnp.clip(jnp.nan_to_num(x), -6e4, 6e4)
        largest = jnp.max(jnp.abs(clean), axis=None if self.breaks == "others" else -1)
        scale = jnp.broadcast_to(jnp.maximum(largest, 1e-4), x.shape[:-1]).astype(jnp.float16)
        codes = jnp.clip(jnp.floor(clean / scale[..., None].astype(jnp.float32) * 7.5 + 8), 0, 15)
        codes = codes + (10 if self.breaks == "range" else 0)
        dtype = jnp.int32 if self.breaks == "dtype" else jnp.uint8
        return Quantized(codes.astype(dtype), (scale,) * (2 if self.breaks == "factors" else 1))

    def code_values(self, codes):
        levels = (codes.astype(jnp.float32) - 7.5) / 7.5
        channel = jnp.broadcast_to(jnp.arange(codes.shape[-1], dtype=jnp.float32), codes.shape)
        return levels * channel if self.breaks == "channels" else levels

    def dequantize(self, quantized):
        values = super().dequantize(quantized)
        return jnp.tanh(values) if self.breaks == "dequantize" else values

    def rotate(self, x):
        return jnp.flip(x, axis=-1) if self.breaks == "rotate" else super().rotate(x)


def own(tensor: TensorCodec, **options) -> KVCodec:
    return KVCodec(name="own", key=tensor, value=MinMax(4), **options)


@pytest.mark.parametrize(
    "breaks, message",
    [
        ("others", "must not depend on other tokens"),
        ("nan", "factors must be finite"),
        ("range", "codes must be below 16, and one is"),
        ("dtype", r"codes must be uint8 \(16, 64\), not int32"),
        ("factors", "factors must be 1 of factor_dtypes, one per token"),
        ("channels", "code_values must work code by code"),
        ("dequantize", r"dequantize must give scale \* code_values"),
        ("rotate", "rotated=False, and rotate changes vectors"),
    ],
)
def test_a_broken_rule_is_named(breaks, message):
    check_codec(own(Halves()))
    with pytest.raises(ValueError, match=f"own, key Halves: .*{message}"):
        check_codec(own(Halves(breaks)))


@dataclass(frozen=True)
class Described(TensorCodec):
    """Only what a codec says of itself."""

    bits: object = 4  # pyright: ignore[reportIncompatibleMethodOverride]
    codes_dtype: object = jnp.uint8  # pyright: ignore[reportIncompatibleMethodOverride]
    factor_dtypes: tuple = ()  # pyright: ignore[reportIncompatibleMethodOverride]


class Unhashable(Described):
    __hash__ = None  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize(
    "tensor, message",
    [
        (Described(bits=5), r"key Described: bits=5 must be one of \(2, 3, 4\) with codes_dtype"),
        (Described(bits=4, codes_dtype=jnp.int8), "bits=4 must be one of"),
        (Described(bits=4.0, codes_dtype=jnp.float16), "bits=4.0 must be one of"),
        (
            Described(factor_dtypes=("float16", "uint8")),
            r"factor_dtypes=\(float16, uint8\) must be",
        ),
        (Described(factor_dtypes=("float32",)), r"factor_dtypes=\(float32\) must be"),
        (Described(factor_dtypes=("float16",) * 3), "at most a scale and a zero"),
        (Unhashable(), "key Unhashable must be hashable"),
        (MinMax, "key=.*MinMax.* must be a TensorCodec"),
        ("int8", "key='int8' must be a TensorCodec"),
    ],
)
def test_what_pages_can_not_hold_is_refused_when_the_codec_is_built(tensor, message):
    with pytest.raises(ValueError, match=message):
        own(tensor)


class OwnUniform(Halves):
    """Codes that are their own levels."""

    code_values = TensorCodec.code_values


class OwnFactors(OwnUniform):
    """Factors stored as logarithms."""

    def factor_values(self, factors):
        return (jnp.exp(factors[0].astype(jnp.float32)), None)


class OwnCodebook(TurboQuant):
    """A codebook of one's own, by TurboQuant's way of reading it."""

    @property
    def levels(self):
        return Codebook(name="own", bits=2, levels=(-2.0, -0.5, 0.5, 2.0))


@pytest.mark.parametrize(
    "tensor, attention",
    [
        (OwnUniform(), "gpu"),
        (OwnCodebook(bits=2), "gpu"),
        (Halves(), "xla"),
        (OwnFactors(), "xla"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_gpu_kernel_serves_by_rule_and_never_writes_codes_it_does_not_know(tensor, attention):
    """It computes levels by itself, so a codec's own `code_values` would be read as another's."""
    spec = jaxkv.LayerSpec(kv_heads=2, head_dim=128, codec=own(tensor, recent_pages=1))
    config = jaxkv.CacheConfig(layers=(spec,), batch=1, max_tokens=256)
    [group] = jaxkv.explain(config, platform="gpu")
    assert (group.attention, group.prefill, group.quantize) == (attention, attention, "xla")
    named = functools.partial(jaxkv.explain, config, platform="gpu", backend="gpu")
    if attention == "xla":
        kind = type(tensor).__name__
        with pytest.raises(NotImplementedError, match=rf"{kind}\.(code|factor)_values: the GPU"):
            named()
    ours = dataclasses.replace(spec, codec=own(MinMax(4), recent_pages=1))
    [group] = jaxkv.explain(dataclasses.replace(config, layers=(ours,)), platform="gpu")
    assert (group.attention, group.quantize) == ("gpu", "gpu")
