"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): a Llama with biases on q, k and v."""

from models.config import DecoderConfig
from models.families.hf_config import build_config, last_layers_sliding, switched_windows

# transformers' defaults, for keys that a file leaves out.
DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "qwen2"; CheckpointError if it is invalid."""
    hf = DEFAULTS | hf
    windows = switched_windows(hf, last_layers_sliding)
    return build_config(hf, windows=windows, attention_bias=True)
