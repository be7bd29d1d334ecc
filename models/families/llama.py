"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783), and models of their shape (SmolLM2)."""

from models.config import DecoderConfig
from models.families.hf_config import OUTPUT_BIAS, build_config, flag, uniform_windows

# transformers' defaults, for keys that a file leaves out.
DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "llama"; CheckpointError if it is invalid."""
    hf = DEFAULTS | hf
    bias = flag(hf, "attention_bias", False)
    return build_config(
        hf,
        windows=uniform_windows(hf, None),
        attention_bias=bias,
        output_bias=flag(hf, OUTPUT_BIAS, bias),
        mlp_bias=flag(hf, "mlp_bias", False),
    )
