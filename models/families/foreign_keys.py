"""Keys of a config.json that change what another architecture computes.

transformers ignores a key that a model's class does not have. So do we, except for those here: a
file that sets one was made for a model that is not this architecture, and would give text that
is subtly wrong.
"""

from models.errors import CheckpointError

_WINDOWED = ("mistral", "mixtral", "gpt_oss", "qwen2", "qwen3", "qwen3_moe", "smollm3")
_SOFT_CAPPED = ("gemma2", "gemma3_text", "gemma3")
# For each key the values that change nothing, and the architectures that read it themselves.
_FOREIGN: dict[str, tuple[tuple, tuple[str, ...]]] = {
    "attn_logit_softcapping": ((None, 0.0), _SOFT_CAPPED),
    "final_logit_softcapping": ((None, 0.0), _SOFT_CAPPED),
    "query_pre_attn_scalar": ((None,), _SOFT_CAPPED),
    "clip_qkv": ((None,), ("olmo2",)),
    "no_rope_layers": ((None,), ("smollm3",)),
    "sliding_window": ((None, 0), (*_WINDOWED, *_SOFT_CAPPED)),
    "attention_multiplier": ((None,), ()),  # Granite's four
    "embedding_multiplier": ((None, 1), ()),
    "residual_multiplier": ((None, 1), ()),
    "logits_scaling": ((None, 1), ()),
    "logit_scale": ((None, 1), ()),  # Cohere
    "attention_chunk_size": ((None, 0), ()),  # Llama 4
    "attn_temperature_tuning": ((None, False, 0), ()),
    "use_bidirectional_attention": ((None, False), ()),
    "is_causal": ((None, True), ()),
    "is_encoder_decoder": ((None, False), ()),
    "add_cross_attention": ((None, False), ()),
    "position_embedding_type": ((None, "rope", "rotary", "absolute"), ()),  # absolute: BERT's
    "alibi": ((None, False), ()),
    "use_dynamic_ntk": ((None, False), ()),
    "use_logn_attn": ((None, False), ()),
}


def refuse_foreign_keys(hf: dict) -> None:
    """Checks a config.json, or the text part of one.

    Raises:
      CheckpointError: it sets a key to a value that its architecture can't follow.
    """
    kind = hf["model_type"]
    for key, (neutral, readers) in _FOREIGN.items():
        value = hf.get(key)
        if kind not in readers and not any(
            value is same or (value == same and same is not None) for same in neutral
        ):
            raise CheckpointError(
                f"config.json: {key}={value!r} changes the model, and {kind!r} has no such setting."
            )
