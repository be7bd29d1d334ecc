"""The public names: each is here on purpose, and none comes or goes unnoticed."""

import importlib
import types

import pytest

NAMES = {
    "jaxkv": (
        "CacheConfig FilledCache Generation KVCache Keep LayerSpec Model Sampling Sizes StopText "
        "Stream check explain fit_key_means generate keep_compiled_programs "
        "load_cache plan save_cache stream"
    ),
    "jaxkv.codecs": (
        "Codebook Exact Float8 Int8 KVCodec MinMax PageLayout Quantized TensorCodec TokenMajor "
        "TokensLast TokensOnLanes TurboQuant codec_names default_layout dequantize_original "
        "gaussian_mse get_codebook get_codec page_mean recipe"
    ),
    "pallas_kernels": (
        "PageLag Pages Part Queries Rule Segment add_learned_sink decode_attention empty_pages "
        "merge paged_attention quantize_pages write_pages"
    ),
    "pallas_kernels.paged_attention": "BACKENDS choose paged_attention",
    "pallas_kernels.quantize_pages": "BACKENDS choose quantize_pages",
    "pallas_kernels.write_pages": "BACKENDS choose write_pages",
    "models": (
        "Checkpoint CheckpointError Decoder DecoderConfig NAMES architecture_config load "
        "open_checkpoint random_model"
    ),
}


def public_names(module: types.ModuleType) -> list[str]:
    """Names without an underscore, modules aside: those depend on imports elsewhere."""
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    )


@pytest.mark.parametrize("name", NAMES)
def test_public_names(name):
    assert public_names(importlib.import_module(name)) == NAMES[name].split()
