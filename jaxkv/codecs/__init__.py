"""KV codecs: what a token's key and value become when a cache stores them in few bits."""

from jaxkv.codecs.affine import Float8, Int8, MinMax
from jaxkv.codecs.codebooks import Codebook, gaussian_mse, get_codebook
from jaxkv.codecs.codec import (
    Exact,
    KVCodec,
    Quantized,
    TensorCodec,
    dequantize_original,
    page_mean,
)
from jaxkv.codecs.layouts import default_layout
from jaxkv.codecs.page_layout import PageLayout
from jaxkv.codecs.presets import codec_names, get_codec, recipe
from jaxkv.codecs.token_major import TokenMajor
from jaxkv.codecs.tokens_last import TokensLast
from jaxkv.codecs.tokens_on_lanes import TokensOnLanes
from jaxkv.codecs.turboquant import TurboQuant

__all__ = [
    "Codebook",
    "Exact",
    "Float8",
    "Int8",
    "KVCodec",
    "MinMax",
    "PageLayout",
    "Quantized",
    "TensorCodec",
    "TokenMajor",
    "TokensLast",
    "TokensOnLanes",
    "TurboQuant",
    "codec_names",
    "default_layout",
    "dequantize_original",
    "gaussian_mse",
    "get_codebook",
    "get_codec",
    "page_mean",
    "recipe",
]
