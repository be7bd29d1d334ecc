"""Mixtral (arXiv:2401.04088): a Mistral with a mixture of experts in the MLP's place."""

from models.config import DecoderConfig
from models.experts import ExpertsConfig
from models.families.hf_config import (
    build_config,
    expert_counts,
    rope_parameters,
    uniform_windows,
    whole,
)

THETA = 1_000_000.0
# transformers' defaults, for keys that a file leaves out.
DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "mixtral"; CheckpointError if it is invalid."""
    hf = DEFAULTS | hf
    count, top_k = expert_counts(hf, 8)
    return build_config(
        hf,
        windows=uniform_windows(hf, whole(hf, "sliding_window", None)),
        rope=rope_parameters(hf, theta=THETA),
        experts=ExpertsConfig(experts=count, top_k=top_k),
    )
