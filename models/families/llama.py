"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783), and models of their shape (SmolLM2)."""

from models.config import DecoderConfig
from models.families.hf_config import build_config, whole


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "llama"; CheckpointError if it is invalid."""
    bias = hf.get("attention_bias", False)
    return build_config(
        hf,
        windows=(None,) * whole(hf, "num_hidden_layers"),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
    )
