"""Reads a Hugging Face folder: config.json and safetensors, one file or shards with an index.

A safetensors file is a length, a JSON header and raw little-endian data. We map it ourselves
instead of using the `safetensors` package: shapes are known before any weight is read, and
bfloat16 and float8 need no torch.
"""

import functools
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.checkpoints.checkpoint import Checkpoint, LazyTensor
from models.checkpoints.mapped_file import check_size, map_file, release_pages
from models.errors import CheckpointError, clear_errors
from models.json_files import MOST_BYTES, parse_json_object, read_json_object
from models.numbers import MOST_DIMS
from models.text.eos_ids import all_eos_ids
from models.text.hf_tokenizer import read_hf_tokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def open_hf_folder(folder: Path) -> Checkpoint:
    """Opens a folder of the kind that transformers' `from_pretrained` reads.

    Raises:
      CheckpointError: a file is missing, truncated or not valid JSON; a shard lacks a tensor.
    """
    config = _read_config(folder)
    if (folder / SINGLE_FILE).exists():
        tensors = open_safetensors(folder / SINGLE_FILE)
    elif (folder / INDEX_FILE).exists():
        tensors = _open_shards(folder / INDEX_FILE)
    else:
        raise CheckpointError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}.")
    return Checkpoint(folder, config, tensors, functools.partial(read_hf_tokenizer, folder))


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the tokens that end a generation of generation_config.json among its own.

    Chat models often name the end of a turn in the second file alone.
    """
    config = read_json_object(folder / "config.json")
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    ends = all_eos_ids(str(folder), config, read_json_object(generation))
    return config | {"eos_token_id": ends} if ends else config


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Maps one safetensors file, whose size must agree with its header.

    Raises:
      CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    data = map_file(path)
    header_bytes = int(data[:8].view("<u8")[0]) if len(data) >= 8 else 0
    start = 8 + header_bytes
    if start > len(data) or len(data) < 8:
        raise CheckpointError(
            f"{path}: truncated or no safetensors file: its header needs {max(start, 9)} bytes, "
            f"the file has {len(data)}."
        )
    if header_bytes > MOST_BYTES:
        raise CheckpointError(f"{path}: its header must have at most {MOST_BYTES} bytes.")
    source = f"{path}: invalid safetensors header"
    header = parse_json_object(data[8:start].tobytes(), source)
    header.pop("__metadata__", None)
    with clear_errors(source):
        entries = {name: _parse_entry(name, entry) for name, entry in header.items()}
    expected = start + _check_places(source, entries)
    if len(data) != expected:
        state = "truncated" if len(data) < expected else "too long"
        raise CheckpointError(f"{path}: {state}: expected {expected} bytes, has {len(data)}.")

    def lazy(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> LazyTensor:
        span = start + begin, start + end

        def read() -> np.ndarray:
            check_size(path, data)
            return data[slice(*span)].view(_DTYPES[dtype]).reshape(shape)

        release = functools.partial(release_pages, data, *span)
        return LazyTensor(shape, dtype, read, end - begin, release)

    return {name: lazy(*entry) for name, entry in entries.items()}


_Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, first byte, end


def _check_places(source: str, entries: dict[str, _Entry]) -> int:
    """Checks that the tensors cover every byte of the data once; returns the number of bytes.

    The safetensors package refuses overlaps and holes, too: they could hide what is in a file.
    """
    expected = 0
    for name, (*_, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != expected:
            raise CheckpointError(
                f"{source}: {name!r} is at byte {begin} and must be at {expected}."
            )
        expected = end
    return expected


def _parse_entry(name: str, entry: dict[str, Any]) -> _Entry:
    """A tensor's row of the header; ValueError if its parts contradict each other."""
    if missing := {"dtype", "shape", "data_offsets"} - set(entry):
        raise ValueError(f"{name!r} has no {min(missing)}")
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"unknown {dtype=}")
    if len(shape) > MOST_DIMS:
        raise ValueError(f"{name!r} has {len(shape)} dimensions, at most {MOST_DIMS} may be")
    if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
        raise ValueError(f"{shape=} and its offsets must be whole numbers, not negative")
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ValueError(f"{shape=} of {dtype} does not fill bytes {begin} to {end}")
    return dtype, shape, begin, end


def _open_shards(index_path: Path) -> dict[str, LazyTensor]:
    """Opens every shard that the index names; tensors that it does not list are left out."""
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: must have a 'weight_map' of tensor names to files.")
    shards: dict[str, dict[str, LazyTensor]] = {}
    tensors: dict[str, LazyTensor] = {}
    for name, file_name in weight_map.items():
        plain = isinstance(file_name, str) and file_name not in ("", ".", "..")
        if not plain or Path(file_name).name != file_name or "\\" in file_name:
            raise CheckpointError(f"{index_path}: {name}: {file_name!r} must be a file name.")
        if file_name not in shards:
            shard = index_path.parent / file_name
            if not shard.exists():
                raise CheckpointError(f"{shard}: missing, but {index_path.name} lists {name!r}.")
            shards[file_name] = open_safetensors(shard)
        if name not in shards[file_name]:
            raise CheckpointError(
                f"{index_path.parent / file_name}: lacks {name!r}, which {index_path.name} lists."
            )
        tensors[name] = shards[file_name][name]
    return tensors
