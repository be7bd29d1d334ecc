"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783), and models of their shape (SmolLM2)."""

from models.config import DecoderConfig
from models.families.hf_config import OUTPUT_BIAS, build_config, flag, uniform_windows

LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "eos_token_id": 2}  # transformers'


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "llama"; CheckpointError if it is invalid."""
    hf = LLAMA_DEFAULTS | hf
    bias = flag(hf, "attention_bias", False)
    return build_config(
        hf,
        windows=uniform_windows(hf, None),
        attention_bias=bias,
        output_bias=flag(hf, OUTPUT_BIAS, bias),
        mlp_bias=flag(hf, "mlp_bias", False),
    )
