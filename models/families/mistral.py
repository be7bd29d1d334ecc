"""Mistral 7B (arXiv:2310.06825): the Llama block with a sliding window."""

from models.config import DecoderConfig
from models.families.hf_config import SLIDING, common, layer_types, layer_windows, whole


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "mistral"; CheckpointError if it can't be one."""
    types = layer_types(hf, [SLIDING] * whole(hf, "num_hidden_layers"))
    return common(hf, windows=layer_windows(hf, types))
