"""Weight files mapped into memory: bytes are read from the disk when they are first touched."""

import mmap
from pathlib import Path

import numpy as np

from models.errors import CheckpointError, one_line


def map_file(path: Path) -> np.ndarray:
    """Maps a file; returns its bytes, `u8[bytes]`, read-only."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}.") from error


def release_pages(data: np.ndarray, begin: int, end: int) -> None:
    """Gives back the memory that bytes `begin` to `end` of a mapped file take.

    Only whole pages of memory are given back. The bytes stay readable: touching them reads the
    disk again.

    Args:
      data: the file as `map_file` returns it.
      begin: the first byte.
      end: the byte after the last.
    """
    mapped = getattr(data.base, "obj", None)  # between array and map there is a memoryview
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return  # an empty file, or no Linux: the system drops pages unasked
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if begin < end:
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)
