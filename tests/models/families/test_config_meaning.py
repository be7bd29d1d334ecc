"""What keys of config.json mean: files as people edit them, and keys that must not be ignored."""

import pytest

from models.errors import CheckpointError
from models.families.architectures import ARCHITECTURES, architecture_config
from models.families.foreign_keys import refuse_foreign_keys
from models.rope import make_rope

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def config(kind="llama", **keys):
    return architecture_config({**SMALL, "model_type": kind, **keys})


def test_gemma3s_bases_beside_its_sets_of_parameters_count():
    plain = config("gemma3_text", rope_theta=2e6, rope_local_base_freq=3e4)
    partial = config(
        "gemma3_text",
        rope_theta=2e6,
        rope_local_base_freq=3e4,
        rope_parameters={"full_attention": {"rope_type": "default"}},
    )
    assert plain.rope == make_rope(8, {"rope_theta": 2e6})
    assert plain.local_rope == make_rope(8, {"rope_theta": 3e4})
    assert (plain.rope, plain.local_rope) == (partial.rope, partial.local_rope)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "smollm3"])
def test_yarn_makes_the_context_longer(kind):
    moe = {"num_experts_per_tok": 2, "num_experts": 4}
    long = config(kind, max_position_embeddings=40_960, rope_scaling=YARN, **moe)
    assert long.max_position == 131_072
    stated = config(kind, max_position_embeddings=262_144, rope_scaling=YARN, **moe)
    assert stated.max_position == 262_144
    plain = config(kind, max_position_embeddings=40_960, rope_scaling=LINEAR, **moe)
    assert plain.max_position == 40_960


def test_yarns_trained_context_may_stand_beside_its_parameters():
    inside = config(rope_scaling=YARN)
    rest = {"rope_type": "yarn", "factor": 4.0}
    beside = config(rope_scaling=rest, original_max_position_embeddings=32_768)
    assert beside == inside
    implied = config(rope_scaling=YARN | {"factor": None}, max_position_embeddings=131_072)
    assert implied.rope == inside.rope


def test_only_a_missing_key_means_the_default():
    with pytest.raises(CheckpointError, match="has no 'hidden_size'"):
        config(hidden_size=None)


@pytest.mark.parametrize(
    "kind, keys, part",
    [
        ("llama", {"sliding_window": 4096}, "sliding_window=4096 changes the model, and 'llama'"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama", {"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
        ("qwen2", {"is_causal": False}, "is_causal=False"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("llama", {"attention_bias": "yes"}, "attention_bias='yes' must be true or false"),
        ("llama", {"rope_scaling": LINEAR | {"attn_factor": 2}}, "attn_factor=2 must be 1"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers"),
    ],
)
def test_keys_that_change_the_meaning_are_refused_by_name(kind, keys, part):
    with pytest.raises(CheckpointError) as caught:
        config(kind, **keys)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_values_that_change_nothing_are_taken(kind):
    neutral = {
        "is_causal": True,
        "use_bidirectional_attention": None,
        "logits_scaling": 1.0,
        "clip_qkv": None,
        "use_cache": True,
        "some_trainers_note": "x",  # transformers ignores what it does not know
    }
    refuse_foreign_keys({"model_type": kind} | neutral)


def test_swish_is_silu():
    assert config(hidden_act="swish") == config(hidden_act="silu")
