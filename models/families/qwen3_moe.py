"""The mixtures of experts of Qwen3 (arXiv:2505.09388): other layers may keep an MLP."""

from models.config import DecoderConfig
from models.errors import CheckpointError
from models.experts import ExpertsConfig
from models.families.hf_config import build_config, expert_counts, flag, uniform_windows, whole

# transformers' defaults, for keys that a file leaves out.
DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
}


def decoder_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "qwen3_moe"; CheckpointError if it is invalid.

    With `use_sliding_window` all layers have the window, as in transformers.
    """
    hf = DEFAULTS | hf
    window = whole(hf, "sliding_window", None) if flag(hf, "use_sliding_window", False) else None
    bias = flag(hf, "attention_bias", False)
    sparse = _sparse_layers(hf)
    return build_config(
        hf,
        windows=uniform_windows(hf, window),
        attention_bias=bias,
        output_bias=bias,
        qk_norm="head",
        experts=_experts(hf) if True in sparse else None,
        expert_size=whole(hf, "moe_intermediate_size"),
        sparse=sparse,
    )


def _experts(hf: dict) -> ExpertsConfig:
    """The mixture of experts. Without `norm_topk_prob` its weights do not sum to 1."""
    count, top_k = expert_counts(hf, 128)
    shares = "chosen" if flag(hf, "norm_topk_prob", False) else "all"
    return ExpertsConfig(experts=count, top_k=top_k, shares=shares)


def _sparse_layers(hf: dict) -> tuple[bool, ...]:
    """Which layers have experts: every `decoder_sparse_step`-th, without `mlp_only_layers`."""
    layers, step = whole(hf, "num_hidden_layers"), whole(hf, "decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise CheckpointError(f"config.json: mlp_only_layers={dense!r} must be a list of layers.")
    dense = set(dense)
    if hf.get("num_experts") == 0:
        return (False,) * layers
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))
