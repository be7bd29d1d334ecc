"""Codecs by name: exact, 8-bit codecs, the published TurboQuant presets, and our recipes.

The published presets read every token as codes. Our recipes keep the sink pages and the newest
pages exact, remove each page's key mean, and choose codes and factors with a smaller error when
they write; docs/design.md says how much each of these gains.
"""

import functools
from dataclasses import replace
from typing import Literal

from pallas_kernels.codecs.affine import Float8, Int8, MinMax
from pallas_kernels.codecs.codec import Exact, KVCodec, TensorCodec
from pallas_kernels.codecs.turboquant import TurboQuant

SIGN_SEED = 0


def published(name: str, key: TensorCodec, value_bits: int) -> KVCodec:
    """A preset as published: min-max values, no token kept exact."""
    return KVCodec(name=name, key=key, value=MinMax(value_bits))


def published_key(bits: int) -> TurboQuant:
    """The published key codec: Hadamard without signs, Lloyd-Max table, factor that keeps norms."""
    return TurboQuant(bits=bits, codebook="lloyd_max", factor="norm")


def recipe(
    name: str,
    *,
    key_bits: int,
    value_bits: int,
    codebook: str = "cubic",
    factor_kind: Literal["float16", "ue5m3"] = "float16",
    key_mean: Literal["static", "page"] | None = "page",
    recent_pages: int = 2,
    sink_tokens: int = 4,
) -> KVCodec:
    """One of our recipes: fixed signs, searched codes, least-squares factors for values.

    Keys have their mean removed and factors that make scores unbiased. Token 0's key is far from
    any mean, so with a mean keep at least one sink token.
    """
    shared = TurboQuant(
        codebook=codebook, factor_kind=factor_kind, search=True, sign_seed=SIGN_SEED
    )
    return KVCodec(
        name=name,
        key=replace(shared, bits=key_bits, factor="unbiased", mean=key_mean is not None),
        value=replace(shared, bits=value_bits, factor="least_squares"),
        recent_pages=recent_pages,
        sink_tokens=sink_tokens,
        key_mean=key_mean,
    )


def exact_codec(dtype: str) -> KVCodec:
    """Keys and values kept in `dtype`."""
    return same("exact", Exact(dtype))


def same(name: str, codec: TensorCodec) -> KVCodec:
    """One codec for keys and values, no token kept exact."""
    return KVCodec(name=name, key=codec, value=codec)


_PRESETS = (
    same("exact", Exact()),
    # Keys have channels far from zero, so a zero point halves their loss (KL divergence 0.0004
    # instead of 0.0008); values do not gain from one.
    KVCodec(name="int8", key=MinMax(8), value=Int8()),
    same("fp8_e4m3", Float8("e4m3")),
    same("fp8_e5m2", Float8("e5m2")),
    published("k8v4", Float8("e4m3"), 4),
    published("4bit_nc", published_key(4), 4),
    published("k3v4_nc", published_key(3), 4),
    published("3bit_nc", published_key(3), 3),
    recipe("tq4", key_bits=4, value_bits=4),
    recipe("tq3", key_bits=3, value_bits=3),
    # 8-bit factors pay for the third key bit: 2.75 bits at head_dim 64 with the page mean.
    recipe("tq2", key_bits=3, value_bits=2, factor_kind="ue5m3"),
)


def codec_names() -> tuple[str, ...]:
    """Names that `get_codec` knows, exact first."""
    return tuple(preset.name for preset in _PRESETS)


@functools.cache
def get_codec(name: str) -> KVCodec:
    """The codec of that name.

    Raises:
      ValueError: unknown name; the message lists the known ones.
    """
    for preset in _PRESETS:
        if preset.name == name:
            return preset
    raise ValueError(f"codec {name!r} is unknown; there are {', '.join(codec_names())}.")
