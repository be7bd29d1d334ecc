"""Mistral 7B (arXiv:2310.06825): the Llama block with a sliding window."""

from models.config import DecoderConfig
from models.hf_config import common, layer_windows


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "mistral"; CheckpointError if it can't be one."""
    return common(hf, windows=layer_windows(hf, uses_window=True))
