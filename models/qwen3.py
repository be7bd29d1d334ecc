"""Qwen3 (arXiv:2505.09388): the Llama block with an RMS norm on every query and key head."""

from models.config import DecoderConfig
from models.hf_config import common, layer_windows


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "qwen3"; CheckpointError if it can't be one."""
    bias = hf.get("attention_bias", False)
    return common(
        hf,
        windows=layer_windows(
            hf,
            uses_window=hf.get("use_sliding_window", False),
            full_first=hf.get("max_window_layers", 28),  # transformers' default
        ),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
