"""What every reader returns: a config, named tensors that are read on access, a tokenizer."""

import dataclasses
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.checkpoints.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a mapped file: its shape is known, `read()` gives the values.

    `release()` says that they have been used: memory that the file's pages took is given back. A
    later read, also through an array that is still held, takes them from the disk again.
    """

    shape: tuple[int, ...]
    dtype: str  # as the file stores it: "BF16", "Q4_1", ...
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)
    nbytes: int  # in the file
    release: Callable[[], None] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights by their Hugging Face names, whatever the file format was."""

    path: Path
    config: dict[str, Any]  # as config.json has it: "model_type", "hidden_size", ...
    tensors: Mapping[str, LazyTensor]  # "model.layers.0.self_attn.q_proj.weight", ...
    tokenizer_loader: Callable[[], "Tokenizer"] = dataclasses.field(repr=False)

    def read(self, name: str) -> np.ndarray:
        """The tensor's values: a quantized one as float32, others typed as stored, read-only."""
        return self._tensor(name).read()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; reads no weights."""
        return self._tensor(name).shape

    def load_tokenizer(self) -> "Tokenizer":
        """The checkpoint's tokenizer; CheckpointError if it has none or an unsupported one."""
        return self.tokenizer_loader()

    def _tensor(self, name: str) -> LazyTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}.")
        return self.tensors[name]


def map_file(path: Path) -> np.ndarray:
    """The file's bytes, u8, mapped: pages come from the disk when they are touched."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}.") from error


def release_pages(data: np.ndarray, begin: int, end: int) -> None:
    """Gives back the memory of a mapped file's pages that lie within bytes `begin` to `end`."""
    mapped = getattr(data.base, "obj", None)  # a memoryview of the map lies between
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return  # an empty file, or no Linux: the system drops pages by itself
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if begin < end:
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)
