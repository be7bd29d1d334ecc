"""gpt-oss (arXiv:2508.10925).

Attention has learned sinks, every other layer has a sliding window, and a mixture of experts takes
the place of the MLP.
"""

from models.config import DecoderConfig
from models.errors import CheckpointError
from models.experts import ExpertsConfig
from models.families.hf_config import (
    build_config,
    every_nth_full,
    expert_counts,
    flag,
    layer_types,
    layer_windows,
    number,
    rope_parameters,
)
from models.mxfp4 import BLOCK

# transformers' defaults, for keys that a file leaves out.
DEFAULTS = {
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "head_dim": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "max_position_embeddings": 131_072,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
}
THETA = 150_000.0
MXFP4 = "mxfp4"  # `quant_method` of packed experts; files without one have plain matrices
# Both published models use this. transformers assumes it for files that give no rope parameters.
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "gpt_oss"; CheckpointError if it is invalid."""
    hf = DEFAULTS | hf
    bias = flag(hf, "attention_bias", True)
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        hf = hf | {"rope_scaling": YARN}
    count, top_k = expert_counts(hf)
    experts = ExpertsConfig(
        experts=count,
        top_k=top_k,
        alpha=number(hf, "swiglu_alpha", 1.702),
        limit=number(hf, "swiglu_limit", 7.0),
        up_offset=1.0,
        biases=True,
        packed=bool(hf.get("quantization_config")),
    )
    config = build_config(
        hf,
        windows=layer_windows(hf, layer_types(hf, every_nth_full(hf, 2))),
        rope=rope_parameters(hf, theta=THETA),
        quantization=MXFP4,
        attention_sinks=True,
        attention_bias=bias,
        output_bias=bias,
        experts=experts,
    )
    for name in ("hidden_size", "intermediate_size"):
        if experts.packed and getattr(config, name) % BLOCK:
            raise CheckpointError(f"{name}={getattr(config, name)} must be a multiple of {BLOCK}.")
    return config
