"""Mistral 7B (arXiv:2310.06825): a Llama whose layers have a sliding window."""

from models.config import DecoderConfig
from models.families.hf_config import SLIDING, build_config, layer_types, layer_windows, whole


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "mistral"; CheckpointError if it is invalid."""
    types = layer_types(hf, [SLIDING] * whole(hf, "num_hidden_layers"))
    return build_config(hf, windows=layer_windows(hf, types))
