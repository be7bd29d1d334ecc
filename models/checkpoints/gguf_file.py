"""Reads a GGUF file as if it were a Hugging Face checkpoint: its names, its order of rows.

The `gguf` package dequantizes. llama.cpp's converter reorders the rows of q and k in models of the
Llama family, so that the two rows of a RoPE pair are neighbours; reading restores the order.
"""

import functools
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.checkpoints.checkpoint import Checkpoint, LazyTensor
from models.checkpoints.dequantize import dequantize
from models.checkpoints.gguf_config import ROPE_FACTORS, read_gguf_config
from models.checkpoints.gguf_header import TensorEntry, read_gguf_header
from models.checkpoints.gguf_names import WRITINGS
from models.checkpoints.mapped_file import check_size, map_file, release_pages
from models.errors import CheckpointError, import_extra
from models.text.gguf_tokenizer import read_gguf_tokenizer


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file of one of the architectures in `WRITINGS`.

    Raises:
      CheckpointError: the file is truncated or damaged, of another architecture, or uses a feature
        that is not supported.
    """
    data = map_file(path)
    fields, entries = read_gguf_header(path, data)
    arch = fields.get("general.architecture")
    if not isinstance(arch, str) or arch not in WRITINGS:
        known = ", ".join(WRITINGS)
        raise CheckpointError(
            f"{path}: architecture {arch!r} is not supported; GGUF files of {known} are."
        )
    writing = WRITINGS[arch]
    _check_places(path, entries, fields.get("general.alignment", 32))
    table = {entry.name: entry for entry in entries}
    read_values = lambda entry: _lazy_tensor(path, data, entry).read()
    config = read_gguf_config(path, fields, table, read_values)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, LazyTensor] = {}
    for entry in entries:
        part = entry.name.split(".")[-2] if entry.name.count(".") else ""
        reordered = heads.get(part) if writing.reorders_qk else None
        offset = writing.norm_offset if entry.name.endswith("norm.weight") else 0.0
        tensor = _lazy_tensor(path, data, entry, heads=reordered, offset=offset)
        if entry.name != ROPE_FACTORS:
            tensors[writing.hf_name(entry.name)] = tensor
    load_tokenizer = functools.partial(read_gguf_tokenizer, fields, source=str(path))
    return Checkpoint(path, config, tensors, load_tokenizer)


def separate_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Moves the rows of each RoPE pair of a head from neighbours to the head's two halves.

    In a head of d rows, rows 0, 2, 4, ... become the first d / 2 rows; rows 1, 3, 5, ... follow.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _row_of(path: Path, entry: TensorEntry) -> tuple[Any, int, int]:
    """A tensor's type, and the values and bytes of each of its rows; CheckpointError if wrong."""
    gguf = import_extra("gguf")
    try:
        kind = gguf.GGMLQuantizationType(entry.ggml_type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: {entry.name}: unknown ggml type {entry.ggml_type}; a newer gguf may know it."
        ) from error
    if not math.prod(entry.shape):
        raise CheckpointError(f"{path}: {entry.name}: shape {entry.shape} must not be empty.")
    row = entry.shape[-1] if entry.shape else 1
    if row % block:
        raise CheckpointError(f"{path}: {entry.name}: {row=} must be a multiple of {block=}.")
    return kind, row, row // block * block_bytes


def _check_places(path: Path, entries: list[TensorEntry], alignment: int) -> None:
    """Checks that each tensor starts where the one before it ends, as llama.cpp does."""
    expected = entries[0].offset if entries else 0
    for entry in entries:
        if entry.offset != expected:
            raise CheckpointError(
                f"{path}: {entry.name} starts at byte {entry.offset} and must at {expected}."
            )
        _, row, row_bytes = _row_of(path, entry)
        size = math.prod(entry.shape) // row * row_bytes
        expected += -(-size // alignment) * alignment


def _lazy_tensor(
    path: Path,
    data: np.ndarray,
    entry: TensorEntry,
    *,
    heads: int | None = None,
    offset: float = 0.0,
) -> LazyTensor:
    """Checks that a tensor lies inside the file; `read()` dequantizes it and restores the rows.

    Args:
      path: names the file in errors.
      data: `u8[bytes]`, the whole file.
      entry: the tensor's row of the table.
      heads: number of heads whose rows the converter has reordered; None if it has not.
      offset: what the converter has added to the values.
    """
    kind, row, row_bytes = _row_of(path, entry)
    end = entry.offset + math.prod(entry.shape) // row * row_bytes
    if end > len(data):
        raise CheckpointError(
            f"{path}: truncated: {entry.name} ends at byte {end}, the file has {len(data)}."
        )
    if heads is not None and (not entry.shape or entry.shape[0] % (2 * heads)):
        raise CheckpointError(
            f"{path}: {entry.name}: shape {entry.shape} must be {heads} heads of even size."
        )

    def read() -> np.ndarray:
        check_size(path, data)
        raw = data[entry.offset : end]
        direct = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        if kind.name in direct:
            values = raw.view(direct[kind.name]).reshape(entry.shape)
        else:
            try:
                values = dequantize(raw, kind).reshape(entry.shape)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{path}: {entry.name}: the gguf package can't dequantize {kind.name}."
                ) from error
        if offset:
            values = values.astype(np.float32) - np.float32(offset)
        return values if heads is None else separate_pairs(values, heads)

    release = functools.partial(release_pages, data, entry.offset, end)
    return LazyTensor(entry.shape, kind.name, read, end - entry.offset, release)
