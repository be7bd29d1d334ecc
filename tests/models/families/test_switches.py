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
# Each case is compiled. These differ from others in numbers alone, or by what another family shows.
SLOW = {
    ("qwen2", "all_windows"),
    ("qwen2", "no_yarn"),
    ("qwen3_moe", "one_expert"),
    ("qwen3_moe", "no_window"),
    ("mixtral", "no_window"),
    ("mixtral", "three_experts"),
    ("smollm3", "every_third"),
    ("smollm3", "every_fourth"),
    ("smollm3", "layer_types"),
    ("smollm3", "theta_of_the_family"),
}
MARKED = [pytest.param(*case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]


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


@pytest.mark.parametrize("name, switch", MARKED)
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
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok=7 must be at most 6"),
        ("qwen3_moe", {"num_local_experts": 5}, "num_local_experts and num_experts must agree"),
        ("qwen3_moe", {"num_experts": 2.5}, "num_experts=2.5"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers=1 must be a list"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers=['0'] must be a list"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size=0"),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 2}, "must be 'sliding_attention'"),
        ("mixtral", {"sliding_window": 0}, "sliding_window=0"),
        ("mixtral", {"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers has 3 entries for 4 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "must be a list of 0 and 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ("smollm3", SLIDING, "use_sliding_window=True"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ("olmo2", {"layer_types": ["sliding_attention"] * 2}, "must be 'full_attention'"),
    ],
)
def test_config_that_can_not_be(name, keys, part):
    with pytest.raises(CheckpointError) as error:
        architecture_config(config_of(name, **keys))
    assert part in str(error.value) and "\n" not in str(error.value)
