"""The command finds what is wrong with a model, and says so by its exit code."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scripts import check_checkpoint
from tests.scripts.check_checkpoint.oracles import ORACLES, ROOT, ROUNDING, largest_difference


@pytest.fixture
def damaged(copy):
    """Copies an oracle and lets a function change its weights."""

    def make(oracle, change):
        folder = copy(oracle)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize(
    "oracle, keys",
    [
        ("mistral_swa", {"sliding_window": 23}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 11000.0}}),
        ("llama3_rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ],
    ids=["window", "rope theta", "rope type"],
)
def test_a_wrong_config_shows(copy, oracle, keys):
    assert largest_difference(copy(oracle, **keys), scan=True) > 1e-3


def test_wrong_weights_show_in_both_figures(differences, damaged):
    """As leaving out the norms of queries and keys would."""

    def change(weights):
        for name in weights:
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weights[name] = np.ones_like(weights[name])

    code, found = differences(damaged("qwen3", change))
    assert code == 1
    assert min(found.values()) > 1e-3


def test_nan_is_no_pass(differences, damaged):
    def change(weights):
        weights["model.norm.weight"][3] = np.nan

    assert differences(damaged("llama", change), "--scan")[0] == 1


def test_tolerance_decides_the_exit_code(differences):
    assert differences(ORACLES / "llama", "--scan", "--tol", "1e-9")[0] == 1


def test_derived_buffers_and_the_tied_head_are_allowed(differences, damaged):
    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    assert differences(damaged("llama", change), "--scan")[0] == 0


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 11, 37, 96, 120])
def test_chunks_are_uneven_and_cover_every_token(tokens):
    chunks = check_checkpoint.uneven_chunks(tokens)
    assert sum(chunks) == tokens and min(chunks) == 1
    assert chunks[-1] == 1  # the last third, one by one
    assert tokens < 12 or len({n for n in chunks if n > 1}) == 2


def run_process(*arguments):
    command = [sys.executable, ROOT / "scripts" / "check_checkpoint.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_process_prints_one_json_object():
    result = run_process(ORACLES / "llama", "--scan", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert max(json.loads(result.stdout).values()) < ROUNDING


def test_process_fails_with_one_line(copy):
    result = run_process(copy("llama", model_type="mamba"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "model_type='mamba'" in result.stderr
