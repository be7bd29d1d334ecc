"""Qwen3 (arXiv:2505.09388): a Llama with an RMS norm on every query and key head."""

from models.config import DecoderConfig
from models.families.hf_config import build_config, last_layers_sliding, switched_windows


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "qwen3"; CheckpointError if it is invalid."""
    bias = hf.get("attention_bias", False)
    hf = {"sliding_window": 4096, "max_window_layers": 28} | hf  # transformers' defaults
    windows = switched_windows(hf, last_layers_sliding)
    return build_config(hf, windows=windows, attention_bias=bias, output_bias=bias, qk_norm="head")
