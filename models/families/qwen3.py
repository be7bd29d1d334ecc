"""Qwen3 (arXiv:2505.09388): a Llama with an RMS norm on every query and key head."""

from models.config import DecoderConfig
from models.families.hf_config import (
    OUTPUT_BIAS,
    build_config,
    flag,
    last_layers_sliding,
    switched_windows,
)

# transformers' defaults, for keys that a file leaves out.
DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


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
