"""Gemma 2, Gemma 3 and gpt-oss: published logits, other shapes, and that the check is not blind."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models.errors import CheckpointError
from models.families.architectures import architecture_config
from scripts import check_checkpoint
from tests.models.numpy_mixed import FULL, SLIDING, YARN, gemma_config, gpt_oss_config, write_folder

ORACLES = Path(__file__).parents[2] / "oracles"
# Float32 rounding of logits whose deviation is near 1; a wrong model is off by more than 1e-3.
ROUNDING = 1e-4


@pytest.fixture(autouse=True)
def settings():
    """Float32 products."""
    with jax.default_matmul_precision("highest"):
        yield


def differences(folder, *, scan, page_size=16, chunk=16) -> tuple[float, float]:
    """The script's two figures: one prefill, and chunks plus decode."""
    model = models.load(folder, dtype="float32", scan=scan)
    tokens, logits = check_checkpoint.read_oracle(folder / "io.npz", model.config.vocab_size)
    length = tokens.shape[1]
    chunks = [chunk] * (length * 2 // 3 // chunk)
    chunks += [1] * (length - sum(chunks))
    args = check_checkpoint.Args(dir=folder, page_size=page_size)
    run = lambda chunks: check_checkpoint.largest_difference(model, tokens, logits, chunks, args)
    return run([length]), run(chunks)


@pytest.fixture
def changed(tmp_path):
    """A copy of an oracle with keys of its config and some of its tensors changed."""

    def make(oracle, tensors=None, **keys):
        folder = tmp_path / "copy"
        shutil.copytree(ORACLES / oracle, folder)
        config = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(config))
        if tensors is not None:
            weights = load_file(folder / "model.safetensors")
            weights = {name: tensors(name, value) for name, value in weights.items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("oracle", ["gemma2", "gemma3", "gpt_oss", "gpt_oss_mxfp4"])
def test_published_layouts_give_published_logits(oracle, scan):
    assert max(differences(ORACLES / oracle, scan=scan)) < ROUNDING


def rope_of(oracle, **changes) -> dict:
    """The oracle's rope parameters with some changed."""
    config = json.loads((ORACLES / oracle / "config.json").read_text())
    return {"rope_parameters": config["rope_parameters"] | changes}


def without_sinks(name, value):
    return np.full_like(value, -np.inf) if name.endswith("sinks") else value


def norms_of_weight_alone(name, value):  # x * w instead of x * (1 + w): the 1 is lost
    return value - 1 if "norm" in name else value


@pytest.mark.parametrize(
    "oracle, tensors, keys",
    [
        ("gpt_oss", without_sinks, {}),
        ("gpt_oss_mxfp4", without_sinks, {}),
        ("gpt_oss", None, {"sliding_window": 4096}),  # as good as none
        ("gpt_oss", None, {"sliding_window": 17}),
        ("gpt_oss", None, {"layer_types": [FULL] * 4}),
        ("gpt_oss", None, rope_of("gpt_oss", attention_factor=1.0)),
        ("gpt_oss", None, rope_of("gpt_oss", factor=7.5)),
        ("gpt_oss", None, rope_of("gpt_oss", truncate=True)),
        ("gpt_oss", None, rope_of("gpt_oss", rope_type="default")),
        ("gpt_oss", None, {"num_experts_per_tok": 3}),
        ("gpt_oss", None, {"swiglu_alpha": 1.6}),
        ("gemma3", norms_of_weight_alone, {}),
        ("gemma3", None, {"sliding_window": 4096}),
        ("gemma3", None, {"sliding_window": 15}),
        ("gemma3", None, rope_of("gemma3", sliding_attention={"rope_theta": 1e6})),
        ("gemma3", None, rope_of("gemma3", full_attention={"rope_theta": 1e4})),
        ("gemma3", None, {"query_pre_attn_scalar": 32}),
        ("gemma3", None, {"final_logit_softcapping": 20.0}),
        ("gemma2", norms_of_weight_alone, {}),
        ("gemma2", None, {"attn_logit_softcapping": None}),
        ("gemma2", None, {"final_logit_softcapping": None}),
        ("gemma2", None, {"sliding_window": 4096}),
        ("gemma2", None, {"layer_types": [FULL, SLIDING] * 2 + [FULL]}),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", None),
)
def test_what_is_left_out_shows_in_both_figures(changed, oracle, tensors, keys):
    """Scanned, and decoded token by token: fewer programs to compile, which is most time."""
    assert min(differences(changed(oracle, tensors, **keys), scan=True, chunk=1)) > 1e-3


SHAPES = {
    "gemma2": gemma_config("gemma2"),
    "gemma2_plain_scores": gemma_config(
        "gemma2", attn_logit_softcapping=None, final_logit_softcapping=3.0, attention_bias=True
    ),
    "gemma3_12_layers": gemma_config("gemma3_text", num_hidden_layers=12, sliding_window=11),
    "gemma3_every_third": gemma_config(
        "gemma3_text", num_hidden_layers=7, sliding_window_pattern=3, final_logit_softcapping=2.0
    ),
    "gemma3_untied": gemma_config(
        "gemma3_text", tie_word_embeddings=False, layer_types=[FULL, SLIDING, SLIDING, FULL, FULL]
    ),
    "gpt_oss_odd": gpt_oss_config(hidden_size=27, intermediate_size=23, sliding_window=21),
    "gpt_oss_packed": gpt_oss_config(
        num_hidden_layers=4, intermediate_size=64, quantization_config={"quant_method": "mxfp4"}
    ),
    "gpt_oss_yarn_whole": gpt_oss_config(
        rope_scaling=YARN | {"truncate": False, "attention_factor": 1.3, "beta_fast": 8.0},
        swiglu_limit=0.8,
        swiglu_alpha=1.1,
        attention_bias=False,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_agree_with_plain_numpy(tmp_path, name):
    write_folder(tmp_path, SHAPES[name])
    assert max(differences(tmp_path, scan=True, page_size=7)) < ROUNDING


# Unrolled layers know no pattern: a model of either family is enough, beside the oracles above.
@pytest.mark.parametrize("name", ["gemma3_every_third", "gpt_oss_odd"])
def test_other_shapes_unrolled(tmp_path, name):
    write_folder(tmp_path, SHAPES[name])
    assert max(differences(tmp_path, scan=False, page_size=8)) < ROUNDING


def test_gemma_3_has_no_cap_on_scores_as_in_transformers():
    capped = architecture_config(gemma_config("gemma3_text", attn_logit_softcapping=50.0))
    assert capped.attention_soft_cap is None


@pytest.mark.parametrize(
    "config, part",
    [
        (gemma_config("gemma2", hidden_activation="silu"), "hidden_activation='silu'"),
        (gemma_config("gemma2", sliding_window=None), "sliding_window"),
        (gemma_config("gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar=0"),
        (gemma_config("gemma2", final_logit_softcapping="30"), "final_logit_softcapping='30'"),
        (gemma_config("gemma2", use_bidirectional_attention=True), "use_bidirectional"),
        (gemma_config("gemma3_text", sliding_window_pattern=0), "sliding_window_pattern=0"),
        (gemma_config("gemma3_text", rope_local_base_freq=-1), "rope_local_base_freq=-1"),
        (gemma_config("gemma3_text", rope_parameters={SLIDING: {}, "x": {}}), "['x']"),
        (gemma_config("gemma3_text", rope_parameters={"x": {}}), "['x']"),
        ({"model_type": "gemma3"}, "text_config=None"),
        (gpt_oss_config(num_experts_per_tok=7), "num_experts_per_tok=7"),
        (gpt_oss_config(num_local_experts=None), "num_local_experts"),
        (gpt_oss_config(quantization_config={"quant_method": "fp8"}), "quant_method='fp8'"),
        (
            gpt_oss_config(hidden_size=40, quantization_config={"quant_method": "mxfp4"}),
            "hidden_size=40 must be a multiple of 32",
        ),
        (gpt_oss_config(swiglu_limit=-7.0), "swiglu_limit=-7.0"),
        (gpt_oss_config(rope_scaling=YARN | {"truncate": "no"}), "truncate='no'"),
        (gpt_oss_config(rope_scaling=YARN | {"mscale": "1"}), "mscale='1'"),
        (gpt_oss_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "original_max"),
        (gpt_oss_config(rope_parameters=YARN | {"partial_rotary_factor": 0.5}), "partial_rotary"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_config_that_can_not_be(config, part):
    with pytest.raises(CheckpointError) as error:
        architecture_config(config)
    assert part in str(error.value) and "\n" not in str(error.value)
