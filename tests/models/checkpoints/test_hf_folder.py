"""Hugging Face folders made here: values, shards, and every way they can be damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.checkpoints.open import open_checkpoint
from models.errors import CheckpointError

WEIGHTS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "model.norm.weight": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(7, dtype=np.int64),
    "half": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 3}))
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def shard(folder, weight_map):
    """Splits the weights over two files, with the given index."""
    (folder / "model.safetensors").unlink()
    names = list(WEIGHTS)
    save_file({n: WEIGHTS[n] for n in names[:2]}, folder / "model-1.safetensors")
    save_file({n: WEIGHTS[n] for n in names[2:]}, folder / "model-2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def full_map():
    return {n: f"model-{1 + (i >= 2)}.safetensors" for i, n in enumerate(WEIGHTS)}


def assert_same(checkpoint, names=WEIGHTS):
    assert set(checkpoint.tensors) == set(names)
    for name in names:
        assert checkpoint.shape(name) == WEIGHTS[name].shape
        values = checkpoint.read(name)
        assert values.dtype == WEIGHTS[name].dtype
        np.testing.assert_array_equal(values, WEIGHTS[name])


def error_of(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_shapes_and_dtypes_are_those_written(folder):
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config == {"model_type": "llama", "hidden_size": 3}
    assert_same(checkpoint)


def test_shards_are_found_through_the_index(folder):
    shard(folder, full_map())
    assert_same(open_checkpoint(folder))


def test_only_tensors_of_the_index_are_kept(folder):
    shard(folder, {"half": "model-2.safetensors"})
    assert_same(open_checkpoint(folder), names=["half"])


def test_unknown_tensor_is_named(folder):
    with pytest.raises(CheckpointError, match="has no tensor 'nothing'"):
        open_checkpoint(folder).read("nothing")


def test_every_truncation_is_one_clear_error(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        message = error_of(folder)
        assert str(file) in message and "truncated" in message and f"has {size}" in message
    file.write_bytes(whole + b"x")
    assert f"too long: expected {len(whole)} bytes" in error_of(folder)


def test_damaged_headers_raise_nothing_else(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[rng.integers(header)] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            open_checkpoint(folder)
        except CheckpointError as error:
            assert str(file) in str(error)


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "does not fill"),
        ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "not negative"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"),
        (3, "invalid safetensors header"),
    ],
)
def test_wrong_header_entry_is_refused(folder, entry, rule):
    header = json.dumps({"w": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "model.safetensors").write_bytes(data)
    assert rule in error_of(folder)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in error_of(folder)
    (folder / "config.json").unlink()
    assert f"{folder / 'config.json'}: cannot be read" in error_of(folder)
    assert "no such file or folder" in error_of(folder / "absent")
    (folder / "weights.bin").write_bytes(b"x")
    assert "must be a *.gguf file or a folder" in error_of(folder / "weights.bin")


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", "\xff"])
def test_bad_config_json_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert str(folder / "config.json") in error_of(folder)


def test_missing_shard_is_named(folder):
    shard(folder, full_map())
    (folder / "model-2.safetensors").unlink()
    message = error_of(folder)
    assert "model-2.safetensors: missing" in message and "'scalar'" in message


def test_tensor_missing_from_its_shard_is_named(folder):
    shard(folder, {**full_map(), "half": "model-1.safetensors"})
    assert "model-1.safetensors: lacks 'half'" in error_of(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"half": "../model-2.safetensors"}])
def test_bad_index_is_refused(folder, weight_map):
    shard(folder, weight_map)
    assert "model.safetensors.index.json" in error_of(folder)


def test_folder_without_tokenizer_says_what_to_use(folder):
    with pytest.raises(CheckpointError, match="no tokenizer.json; give token ids"):
        open_checkpoint(folder).load_tokenizer()
