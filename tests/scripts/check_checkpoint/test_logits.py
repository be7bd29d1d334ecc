"""Models of published layouts and of odd shapes give the logits that are stored beside them."""

import ml_dtypes
import pytest

from tests.models.numpy_llama import make_config, write_folder
from tests.scripts.check_checkpoint.oracles import ORACLES, ROUNDING, largest_difference


@pytest.mark.both_pythons
@pytest.mark.parametrize(
    "oracle, scan",
    [
        ("llama", "--scan"),
        ("qwen3", "--no-scan"),
        pytest.param("llama", "--no-scan", marks=pytest.mark.slow),
        pytest.param("llama3_rope", "--no-scan", marks=pytest.mark.slow),
        pytest.param("qwen3", "--scan", marks=pytest.mark.slow),
    ],
)
def test_both_figures_of_published_layouts_are_small(differences, oracle, scan):
    code, found = differences(ORACLES / oracle, "--json", scan)
    assert code == 0
    assert max(found.values()) < ROUNDING


# gemma3 and gpt_oss otherwise: test_gemma_gpt_oss.py
@pytest.mark.parametrize(
    "oracle, scan",
    [
        ("llama3_rope", True),
        ("mistral_swa", True),
        ("mistral_swa", False),
        ("gemma3", True),
        ("gpt_oss_mxfp4", False),
    ],
)
def test_published_layouts_give_published_logits(oracle, scan):
    assert largest_difference(ORACLES / oracle, scan=scan) < ROUNDING


@pytest.mark.parametrize("oracle, page_size", [("mistral_swa", 7), ("llama", 512)])
def test_page_size_does_not_matter(oracle, page_size):
    assert largest_difference(ORACLES / oracle, page_size=page_size) < ROUNDING


SHAPES = {
    "heads_7_1": make_config(num_attention_heads=7, num_key_value_heads=1, head_dim=16),
    "head_dim_80_linear_rope": make_config(
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=80,
        rope_scaling={"type": "linear", "factor": 2.5},  # as older files have it
    ),
    "head_dim_24_window_19": make_config("mistral", head_dim=24, sliding_window=19),
    "biases_tied": make_config(
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        num_attention_heads=5,
        num_key_value_heads=None,  # as many
        head_dim=None,  # hidden_size / 5
    ),
    "qwen3_window_off_biases": make_config(
        "qwen3", use_sliding_window=False, sliding_window=5, attention_bias=True
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_agree_with_plain_numpy(tmp_path, name):
    write_folder(tmp_path, SHAPES[name])
    assert largest_difference(tmp_path, scan=True) < ROUNDING


@pytest.mark.parametrize("tokens", [1, 2])
def test_short_inputs(differences, tmp_path, tokens):
    write_folder(tmp_path, make_config(), tokens=tokens, batch=1)
    code, found = differences(tmp_path)
    assert code == 0 and max(found.values()) < ROUNDING


def test_shards_with_an_index(tmp_path):
    write_folder(tmp_path, make_config(), shards=3)
    assert not (tmp_path / "model.safetensors").exists()
    assert largest_difference(tmp_path, scan=True) < ROUNDING


def test_bfloat16_weights_run_in_float32(tmp_path):
    stored = write_folder(tmp_path, make_config(), dtype=ml_dtypes.bfloat16)
    assert stored["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert largest_difference(tmp_path, scan=True) < ROUNDING
