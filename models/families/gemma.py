"""The text models of Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786).

In both, some layers have a sliding window and others see everything; norms multiply by
`1 + weight` and stand before and after attention and MLP; embeddings are scaled; the head is tied.
Gemma 2 bounds scores and logits. Gemma 3 normalises queries and keys instead, and its sliding
layers have a rotation of their own.
"""

from models.config import DecoderConfig
from models.errors import CheckpointError
from models.families.hf_config import (
    FULL,
    SLIDING,
    build_config,
    every_nth_full,
    flag,
    layer_types,
    layer_windows,
    number,
    rope_parameters,
    whole,
)

# transformers' defaults. Published files rely on them; that of gemma-3-4b-it gives three sizes.
_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
GEMMA2_DEFAULTS = _DEFAULTS | {
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3_DEFAULTS = _DEFAULTS | {"vocab_size": 262_208, "max_position_embeddings": 131_072}
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0

# Starts of the names of tensors that multimodal Gemma 3 checkpoints have for images. Text does not
# use them, so they are not loaded.
IMAGE_TENSORS = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


def gemma2_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "gemma2"; CheckpointError if it is invalid."""
    hf = GEMMA2_DEFAULTS | hf
    types = layer_types(hf, every_nth_full(hf, 2))
    return _gemma(
        hf, types, attention_soft_cap=number(hf, "attn_logit_softcapping", None), qk_norm=None
    )


def gemma3_config(hf: dict) -> DecoderConfig:
    """Reads a `config.json` with `model_type` "gemma3_text"; CheckpointError if it is invalid.

    `attn_logit_softcapping` is ignored, as in transformers: no published Gemma 3 bounds scores.
    """
    hf = GEMMA3_DEFAULTS | hf
    pattern = whole(hf, "sliding_window_pattern", whole(hf, "_sliding_window_pattern", 6))
    types = layer_types(hf, every_nth_full(hf, pattern))
    full, local = _ropes(hf)
    return _gemma(hf, types, rope=full, local_rope=local, qk_norm="head")


def gemma3_multimodal_config(hf: dict) -> DecoderConfig:
    """Reads the text part of a `config.json` with `model_type` "gemma3"."""
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config={text!r} must be an object.")
    outside = ("model_type", "eos_token_id", "tie_word_embeddings", "quantization_config")
    return gemma3_config(text | {key: hf[key] for key in outside if key in hf})


def _gemma(hf: dict, types: tuple[str, ...], **own) -> DecoderConfig:
    """Builds the config from the keys that Gemma 2 and Gemma 3 share."""
    if hf.get("use_bidirectional_attention"):
        raise CheckpointError("config.json: use_bidirectional_attention=True is not supported.")
    # The window must be a number: null would leave sliding layers without one.
    whole(hf, "sliding_window")
    bias = flag(hf, "attention_bias", False)
    return build_config(
        hf,
        windows=layer_windows(hf, types),
        activation="gelu_pytorch_tanh",
        attention_scale=number(hf, "query_pre_attn_scalar") ** -0.5,
        logits_soft_cap=number(hf, "final_logit_softcapping", None),
        attention_bias=bias,
        output_bias=bias,
        norm_places="both",
        unit_offset_norms=True,
        scale_embeddings=True,
        **own,
    )


def _ropes(hf: dict) -> tuple[dict, dict]:
    """Parameters of Gemma 3's rotation of full and of sliding layers, from new or old keys."""
    theta = number(hf, "rope_theta", GLOBAL_THETA)
    local_theta = number(hf, "rope_local_base_freq", LOCAL_THETA)
    new = hf.get("rope_parameters")
    if isinstance(new, dict) and set(new) & {FULL, SLIDING}:
        if unknown := set(new) - {FULL, SLIDING}:
            raise CheckpointError(f"config.json: rope_parameters has {sorted(unknown)}.")
        if hf.get("rope_scaling"):
            raise CheckpointError(
                "config.json: rope_scaling beside rope_parameters of both kinds of layers: "
                "put it into those of full_attention."
            )
        read = lambda kind, theta: rope_parameters({"rope_parameters": new.get(kind)}, theta=theta)
        return read(FULL, theta), read(SLIDING, local_theta)
    # In older files the scaling applies to the full layers alone.
    return rope_parameters(hf, theta=theta), {"rope_theta": local_theta}
