"""Qwen3 (arXiv:2505.09388): a Llama with an RMS norm on every query and key head."""

from models.config import DecoderConfig
from models.families.hf_config import FULL, SLIDING, build_config, layer_types, layer_windows, whole


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "qwen3"; CheckpointError if it is invalid."""
    bias = hf.get("attention_bias", False)
    layers = whole(hf, "num_hidden_layers")
    windows: tuple[int | None, ...] = (None,) * layers
    if hf.get("use_sliding_window", False):
        full_first = min(hf.get("max_window_layers", 28), layers)  # transformers' default
        older = [FULL] * full_first + [SLIDING] * (layers - full_first)
        windows = layer_windows(hf, layer_types(hf, older))
    return build_config(hf, windows=windows, attention_bias=bias, output_bias=bias, qk_norm=True)
