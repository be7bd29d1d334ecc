"""Mixtral (arXiv:2401.04088): a Mistral with a mixture of experts in the MLP's place."""

from models.config import DecoderConfig
from models.experts import ExpertsConfig
from models.families import mistral
from models.families.hf_config import (
    build_config,
    expert_counts,
    rope_parameters,
    uniform_windows,
    whole,
)

THETA = 1_000_000.0
# transformers' defaults, for keys that a file leaves out.
DEFAULTS = mistral.DEFAULTS | {
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
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
