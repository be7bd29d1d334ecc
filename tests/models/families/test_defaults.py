"""A file that leaves a key out means transformers' default of its architecture."""

import json
from pathlib import Path

import pytest

from models.families.architectures import architecture_config

# `to_dict()` of transformers 5.24.0's configs without arguments, but for keys of training and
# of the library itself.
STORED = Path(__file__).parents[2] / "data" / "transformers_defaults.json"
DEFAULTS = json.loads(STORED.read_text())


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_file_without_keys_is_one_with_the_defaults(kind):
    bare = architecture_config({"model_type": kind})
    assert bare == architecture_config(DEFAULTS[kind] | {"model_type": kind})
    assert bare.layers == DEFAULTS[kind]["num_hidden_layers"]


@pytest.mark.parametrize("kind", DEFAULTS)
def test_each_key_alone_may_be_left_out(kind):
    """Keys that agree with each other do not hide a default that differs."""
    full = DEFAULTS[kind] | {"model_type": kind}
    for key in DEFAULTS[kind]:
        rest = {name: value for name, value in full.items() if name != key}
        assert architecture_config(rest) == architecture_config(full), key


@pytest.mark.parametrize(
    "kind, windows",
    [
        ("qwen2", (None,) * 28 + (4096,) * 4),
        ("qwen3_moe", (4096,) * 24),
        ("smollm3", (None,) * 36),  # without a window the switch does nothing
    ],
)
def test_the_switch_alone_takes_the_default_window(kind, windows):
    config = architecture_config({"model_type": kind, "use_sliding_window": True})
    assert config.windows == windows
