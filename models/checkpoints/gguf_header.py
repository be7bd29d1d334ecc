"""Reads a GGUF file's metadata and tensor table; every length is checked against the file.

The `gguf` package has a reader, `GGUFReader`. It takes 2 s for the vocabulary of a 135M model
(this one: 0.1 s), and on a truncated file it raises various errors or never returns. The tests
compare the two.
"""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import CheckpointError, one_line
from models.numbers import MOST_DIMS, whole_number

_STRING, _ARRAY = 8, 9
_SCALARS = {  # from GGUF's number of a value type to numpy's name
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
# Published headers have up to 15 MB, 2,000 tensors, 100 fields. Python's objects for a header can
# take ten times its bytes.
MOST_HEADER = 64 << 20  # bytes
MOST_ROWS = 1 << 18  # of the tensor table, and of the metadata


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]  # slowest axis first, the order of numpy and Hugging Face
    ggml_type: int
    offset: int  # bytes from the start of the file


class _Cursor:
    """A position in the mapped file; reading past the end is a CheckpointError."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data, 0

    def skip(self, count: int) -> int:
        """Moves past the next `count` bytes; returns where they start."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise CheckpointError(
                f"{self.path}: truncated: its header needs at least {self.at} bytes, "
                f"the file has {len(self.data)}."
            )
        if self.at > MOST_HEADER:
            raise CheckpointError(f"{self.path}: its header must have at most {MOST_HEADER} bytes.")
        return start

    def scalar(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        start = self.skip(dtype.itemsize)
        return self.data[start : self.at].view(dtype)[0].item()

    def count(self, kind: str, most: int, what: str) -> int:
        """A number of things that follow; a CheckpointError if it is more than `most`."""
        found = self.scalar(kind)
        if found > most:
            raise CheckpointError(f"{self.path}: {found} {what} must be at most {most}.")
        return found

    def string(self) -> str:
        start = self.skip(self.scalar("<u8"))
        return self.data[start : self.at].tobytes().decode("utf-8")

    def strings(self, count: int) -> list[str]:
        """`count` strings in a row. Faster than as many calls of `string()`: no numpy objects."""
        buffer, values = memoryview(self.data.data), []
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", buffer, self.skip(8))
            start = self.skip(size)
            values.append(str(buffer[start : self.at], "utf-8"))
        return values

    def value(self, kind: int) -> Any:
        """A value of GGUF's type `kind`; an array becomes a list."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"unknown value type {kind}")
        item, count = self.scalar("<u4"), self.scalar("<u8")
        if item == _STRING:
            return self.strings(count)
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item])
            start = self.skip(count * dtype.itemsize)
            return self.data[start : self.at].view(dtype).tolist()
        raise ValueError(f"unsupported array of value type {item}")

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """A row of the tensor table: name, shape, ggml type, offset from the start of the data."""
        name = self.string()
        dims = [self.scalar("<u8") for _ in range(self.count("<u4", MOST_DIMS, "dimensions"))]
        return name, tuple(reversed(dims)), self.scalar("<u4"), self.scalar("<u8")


def read_gguf_header(path: Path, data: np.ndarray) -> tuple[dict[str, Any], list[TensorEntry]]:
    """Reads the header of a mapped file.

    Args:
      path: names the file in errors.
      data: `u8[bytes]`, the whole file.

    Returns:
      The metadata as Python values (arrays as lists), and the tensor table.

    Raises:
      CheckpointError: the file is not GGUF, of an unsupported version, truncated or damaged.
    """
    cursor = _Cursor(path, data)
    if data[:4].tobytes() != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file: it must start with b'GGUF'.")
    cursor.skip(4)
    version = cursor.scalar("<u4")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: {version=} of GGUF must be 2 or 3, little-endian.")
    tensor_count = cursor.count("<u8", MOST_ROWS, "tensors")
    field_count = cursor.count("<u8", MOST_ROWS, "fields of metadata")
    try:
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = cursor.string()
            if key in fields:
                raise ValueError(f"{key!r} is there twice")
            fields[key] = cursor.value(cursor.scalar("<u4"))
        rows = [cursor.tensor() for _ in range(tensor_count)]
        if len({name for name, *_ in rows}) < len(rows):
            raise ValueError("a tensor is there twice")
    except CheckpointError:
        raise
    except ValueError as error:  # bad UTF-8, an unknown type
        raise CheckpointError(f"{path}: damaged GGUF header: {one_line(error)}.") from error
    align = whole_number(f"{path}: general.alignment", fields.get("general.alignment", 32))
    start = -(-cursor.at // align) * align
    return fields, [TensorEntry(*row[:3], offset=start + row[3]) for row in rows]
