"""The public names: each is here on purpose, and none comes or goes unnoticed."""

import importlib
import re
import types
from pathlib import Path

import pytest

NAMES = {
    "jaxkv": (
        "CacheConfig FilledCache Generation KVCache Keep LayerSpec Model Sampling Sizes StopText "
        "Stream check explain fit_key_means generate keep_compiled_programs "
        "load_cache plan save_cache stream"
    ),
    "jaxkv.codecs": (
        "Codebook Exact Float8 Int8 KVCodec MinMax PageLayout Quantized TensorCodec TokenMajor "
        "TokensLast TokensOnLanes TurboQuant check_codec codec_names default_layout "
        "dequantize_original finite_input gaussian_mse get_codebook get_codec load_factor "
        "page_mean recipe store_factor"
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


API = Path(__file__).parents[1] / "docs" / "api.md"


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


@pytest.mark.parametrize("name", ["jaxkv", "models"])
def test_the_api_page_has_every_public_name(name):
    """Constants aside, which have no page of their own."""
    told = re.findall(r"^::: (\S+)\.(\w+)$", API.read_text(encoding="utf-8"), re.MULTILINE)
    module = importlib.import_module(name)
    told_here = {thing for file, thing in told if file.split(".")[0] == name}
    missing = {n for n in public_names(module) if not n.isupper()} - told_here
    assert not missing
    for file, thing in told:
        assert hasattr(importlib.import_module(file), thing)
