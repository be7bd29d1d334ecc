"""Mistral 7B (arXiv:2310.06825): a Llama whose layers have a sliding window."""

from models.config import DecoderConfig
from models.families.hf_config import build_config, uniform_windows, whole

# transformers' defaults. A file without the key has the window of Mistral 7B; null means none.
DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "eos_token_id": 2,
}


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "mistral"; CheckpointError if it is invalid."""
    hf = DEFAULTS | hf
    return build_config(hf, windows=uniform_windows(hf, whole(hf, "sliding_window", None)))
