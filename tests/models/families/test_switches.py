"""Tiny checkpoints give transformers' logits: as they stand, and under every switch they have."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.errors import CheckpointError
from models.families.architectures import architecture_config
from tests.scripts.check_checkpoint.oracles import ORACLES, ROUNDING, largest_difference, prefill

FOLDERS = ("qwen2", "qwen3_moe", "qwen3_moe_mixed", "mixtral", "smollm3", "olmo2")
SWITCHES = {name: json.loads((ORACLES / name / "switches.json").read_text()) for name in FOLDERS}
CASES = [(name, switch) for name in FOLDERS for switch in SWITCHES[name]]


@pytest.fixture(autouse=True)
def settings():
    """Float32 products."""
    with jax.default_matmul_precision("highest"):
        yield


def config_of(name: str, **keys) -> dict:
    """An oracle's config.json with `keys` put in; None leaves a key out."""
    config = json.loads((ORACLES / name / "config.json").read_text()) | keys
    return {key: value for key, value in config.items() if value is not None}


def switched(folder: Path, name: str, switch: str) -> Path:
    """An oracle under a switch, without the tensors that it then does not have."""
    keys = dict(SWITCHES[name][switch])
    drop = re.compile(keys.pop("drop", "$^"))
    weights = load_file(ORACLES / name / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not drop.search(key)}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(name, **keys)))
    with (
        np.load(ORACLES / name / "io.npz") as io,
        np.load(ORACLES / name / "switches.npz") as other,
    ):
        np.savez(folder / "io.npz", input_ids=io["input_ids"][:1], logits=other[switch])
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_chunks_and_decode_give_published_logits(name):
    assert largest_difference(ORACLES / name, scan=True) < ROUNDING


@pytest.mark.parametrize("name, switch", CASES)
def test_switches_give_published_logits(tmp_path, name, switch):
    assert prefill(switched(tmp_path, name, switch)) < ROUNDING


@pytest.mark.parametrize("name, switch", CASES)
def test_every_switch_shows(name, switch):
    """The stored logits differ: a reader that ignores the switch fails the test above."""
    with (
        np.load(ORACLES / name / "io.npz") as io,
        np.load(ORACLES / name / "switches.npz") as other,
    ):
        assert np.abs(io["logits"][:1] - other[switch]).max() > 100 * ROUNDING


SLIDING = {"layer_types": ["sliding_attention"] * 4}


@pytest.mark.parametrize(
    "name, keys, part",
    [
        ("qwen2", SLIDING | {"use_sliding_window": False}, "use_sliding_window=True"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window='yes' must be true or false"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers=-1"),
        ("qwen2", {"max_window_layers": 2.0}, "max_window_layers=2.0"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "rope_type='mrope'"),
    ],
)
def test_config_that_can_not_be(name, keys, part):
    with pytest.raises(CheckpointError) as error:
        architecture_config(config_of(name, **keys))
    assert part in str(error.value) and "\n" not in str(error.value)
