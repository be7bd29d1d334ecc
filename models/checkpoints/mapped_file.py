"""Weight files mapped into memory: bytes are read from the disk when they are first touched.

A mapped file must not become shorter while it is in use: touching bytes that are gone ends the
process with SIGBUS. `check_size` sees this right before a tensor is read, but not during the read.
"""

import mmap
from pathlib import Path

import numpy as np

from models.errors import CheckpointError, one_line


def map_file(path: Path) -> np.ndarray:
    """Maps a file; returns its bytes, `u8[bytes]`, read-only."""
    try:
        if not path.is_file():  # opening a pipe might never end
            raise CheckpointError(f"{path}: must be a file.")
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}.") from error


def check_size(path: Path, data: np.ndarray) -> None:
    """Raises CheckpointError if a mapped file has become shorter since `map_file` returned it."""
    mapped = _mapping(data)
    if mapped is not None and (size := mapped.size()) < len(data):
        raise CheckpointError(
            f"{path}: was cut from {len(data)} to {size} bytes while it was in use."
        )


def release_pages(data: np.ndarray, begin: int, end: int) -> None:
    """Gives back the memory that bytes `begin` to `end` of a mapped file take.

    Only whole pages of memory are given back. The bytes stay readable: touching them reads the
    disk again.

    Args:
      data: the file as `map_file` returns it.
      begin: the first byte.
      end: the byte after the last.
    """
    mapped = _mapping(data)
    if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
        return  # an empty file, or no Linux: the system drops pages unasked
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if begin < end:
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _mapping(data: np.ndarray) -> mmap.mmap | None:
    """The map below an array of `map_file`; None where the file was empty."""
    mapped = getattr(data.base, "obj", None)  # between array and map there is a memoryview
    return mapped if isinstance(mapped, mmap.mmap) else None
