"""KV codecs, and the page layouts that pack their codes: the public names."""

from pallas_kernels.codecs.affine import Float8, Int8, MinMax
from pallas_kernels.codecs.codebooks import Codebook, gaussian_mse, get_codebook
from pallas_kernels.codecs.codec import (
    Exact,
    KVCodec,
    Quantized,
    TensorCodec,
    dequantize_original,
    finite_input,
    page_mean,
)
from pallas_kernels.codecs.contract import check_codec
from pallas_kernels.codecs.factors import load_factor, store_factor
from pallas_kernels.codecs.presets import codec_names, get_codec, recipe
from pallas_kernels.codecs.turboquant import TurboQuant
from pallas_kernels.layouts.choose import default_layout
from pallas_kernels.layouts.page_layout import PageLayout
from pallas_kernels.layouts.token_major import TokenMajor
from pallas_kernels.layouts.tokens_last import TokensLast
from pallas_kernels.layouts.tokens_on_lanes import TokensOnLanes

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
    "check_codec",
    "codec_names",
    "default_layout",
    "dequantize_original",
    "finite_input",
    "gaussian_mse",
    "get_codebook",
    "get_codec",
    "load_factor",
    "page_mean",
    "recipe",
    "store_factor",
]
