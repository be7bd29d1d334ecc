"""Qwen3 (arXiv:2505.09388): a Llama with an RMS norm on every query and key head."""

from models.config import DecoderConfig
from models.families import qwen2
from models.families.hf_config import (
    OUTPUT_BIAS,
    build_config,
    flag,
    last_layers_sliding,
    switched_windows,
)

# transformers' defaults, for keys that a file leaves out.
DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "qwen3"; CheckpointError if it is invalid."""
    hf = DEFAULTS | hf
    bias = flag(hf, "attention_bias", False)
    return build_config(
        hf,
        windows=switched_windows(hf, last_layers_sliding),
        attention_bias=bias,
        output_bias=flag(hf, OUTPUT_BIAS, bias),
        qk_norm="head",
    )
