"""Places, sizes and names in weight files that would read wrong bytes, too much, or elsewhere."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from models.checkpoints import load_decoder
from models.checkpoints.hf_folder import open_safetensors
from models.checkpoints.open import open_checkpoint
from models.errors import CheckpointError
from models.load import load
from tests.models import numpy_llama
from tests.models.hostile.files import gguf_parts
from tests.models.hostile.mutations import gguf_bytes

F32 = lambda shape, begin, end: {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def write_safetensors(path: Path, header: dict, size: int) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    return path


@pytest.mark.parametrize(
    "header, size, sound",
    [
        ({"a": F32([2], 0, 8), "b": F32([1], 8, 12)}, 12, True),
        ({"b": F32([1], 8, 12), "a": F32([2], 0, 8)}, 12, True),
        ({"a": F32([2], 0, 8), "e": F32([0], 8, 8), "b": F32([1], 8, 12)}, 12, True),
        ({"a": F32([2], 0, 8), "b": F32([2], 4, 12)}, 12, False),  # overlap
        ({"a": F32([2], 0, 8), "b": F32([2], 0, 8)}, 8, False),  # the same bytes twice
        ({"a": F32([2], 0, 8), "b": F32([1], 12, 16)}, 16, False),  # a hole
        ({"a": F32([2], 4, 12)}, 12, False),  # a hole before
        ({"a": F32([2], 0, 8)}, 12, False),  # bytes after
        ({"a": F32([3], 0, 8)}, 8, False),
        ({"a": F32([True, 2], 0, 8)}, 8, False),
        ({"a": F32([2.0], 0, 8)}, 8, False),
        ({}, 0, True),
    ],
)
def test_safetensors_cover_each_byte_once_as_the_package_wants(tmp_path, header, size, sound):
    path = write_safetensors(tmp_path / "m.safetensors", header, size)
    if sound:
        assert set(open_safetensors(path)) == set(load_file(path)) == set(header)
        return
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(CheckpointError, match=str(path)):
        open_safetensors(path)


def test_a_header_is_never_larger_than_its_limit(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 33))
        file.truncate(1 << 34)  # a sparse file: it takes no space
    with pytest.raises(CheckpointError, match="its header must have at most"):
        open_safetensors(path)
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1 << 40))
        file.truncate(1 << 34)
    with pytest.raises(CheckpointError, match="tensors must be at most"):
        open_checkpoint(path)
    with path.open("r+b") as file:  # one field, an array of 10^10 bytes that the file has
        file.write(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 10**10))
    with pytest.raises(CheckpointError, match="its header must have at most"):
        open_checkpoint(path)


def change_row(name: str, **keys) -> bytes:
    """A GGUF file in which one row of the tensor table is changed."""
    fields, tensors = gguf_parts()
    dims, kind, offset, data = tensors[name]
    tensors[name] = (keys.get("dims", dims), kind, offset + keys.get("shift", 0), data)
    return gguf_bytes(fields, tensors)


@pytest.mark.parametrize(
    "keys, part",
    [
        ({"shift": -32}, "starts at byte"),  # overlaps the one before
        ({"shift": 32}, "starts at byte"),
        ({"shift": 2**40}, "starts at byte"),
        ({"dims": (32, 2**60)}, "starts at byte|truncated"),
        ({"dims": (1,) * 9}, "dimensions must be at most 8"),
    ],
)
def test_gguf_tensors_stand_one_after_the_other(tmp_path, keys, part):
    path = tmp_path / "m.gguf"
    path.write_bytes(change_row("blk.0.attn_q.weight"))
    assert open_checkpoint(path).shape("model.layers.0.self_attn.q_proj.weight") == (32, 32)
    path.write_bytes(change_row("blk.0.attn_q.weight", **keys))
    with pytest.raises(CheckpointError, match=part):
        open_checkpoint(path)


@pytest.mark.parametrize("twice", ["llama.block_count", "output_norm.weight"])
def test_gguf_names_are_there_once(tmp_path, twice):
    fields, tensors = gguf_parts()
    for table in (fields, tensors):
        if twice in table:
            table[twice.encode()] = table[twice]  # packed alike, another key of the dict
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(fields, tensors))
    with pytest.raises(CheckpointError, match="is there twice"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_file_that_is_cut_while_it_is_used_is_one_line(tmp_path, kind):
    if kind == "gguf":
        path = tmp_path / "m.gguf"
        path.write_bytes(change_row("blk.0.attn_q.weight"))
        checkpoint = open_checkpoint(path)
    else:
        numpy_llama.write_folder(tmp_path, numpy_llama.make_config(), tokens=2)
        path, checkpoint = tmp_path / "model.safetensors", open_checkpoint(tmp_path)
    checkpoint.read("model.norm.weight")
    os.truncate(path, path.stat().st_size // 2)
    for name in checkpoint.tensors:
        with pytest.raises(CheckpointError, match="was cut from .* while it was in use"):
            checkpoint.read(name)


def test_a_model_must_fit_into_memory(tmp_path, monkeypatch):
    numpy_llama.write_folder(tmp_path, numpy_llama.make_config(), tokens=2)
    sizes = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(load_decoder.os, "sysconf", sizes.__getitem__)
    with pytest.raises(CheckpointError, match="needs .* GiB of memory, and this machine has 0.0"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["..", ".", "", "../b.safetensors", "/etc/passwd", "a\\b", 5, []])
def test_shards_are_files_of_the_folder(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="must be a file name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["x" * 1000, "a\0b"])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(CheckpointError):
        open_checkpoint(str(tmp_path / name))
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="must be a file"):
        open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="must be a file"):
        open_checkpoint(tmp_path / "m.gguf")
