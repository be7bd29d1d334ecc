"""Qwen3's mixed windows, as newer and older config files say them."""

import jax
import pytest

import models
from models.families.architectures import architecture_config
from tests.models.numpy_llama import make_config, write_folder
from tests.scripts.check_checkpoint.oracles import ROUNDING, largest_difference

MIXED = {"use_sliding_window": True, "sliding_window": 19, "num_hidden_layers": 3}


def test_mixed_windows_agree_with_plain_numpy(tmp_path):
    types = ["full_attention", "sliding_attention", "full_attention"]
    write_folder(tmp_path, make_config("qwen3", **MIXED, layer_types=types))
    assert largest_difference(tmp_path) < ROUNDING


@pytest.mark.parametrize(
    "keys, windows",
    [
        ({"max_window_layers": 2}, (None, None, 19)),  # older files have no layer_types
        ({"max_window_layers": 0}, (19, 19, 19)),
        ({"max_window_layers": 28}, (None, None, None)),
        ({"use_sliding_window": False}, (None, None, None)),
    ],
)
def test_windows_of_older_qwen3_files(keys, windows):
    assert architecture_config(make_config("qwen3", **MIXED | keys)).windows == windows


def test_layers_are_scanned_on_tpus_and_unrolled_elsewhere(tmp_path, monkeypatch):
    write_folder(tmp_path, make_config("qwen3", **MIXED, max_window_layers=1), tokens=1)
    assert not models.load(tmp_path, dtype="float32").repeats
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not models.load(tmp_path, dtype="float32").repeats
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    scanned = models.load(tmp_path, dtype="float32")
    assert scanned.scan and scanned.repeats == 1 and len(scanned.pattern) == 3
