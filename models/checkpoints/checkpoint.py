"""The value every reader returns: a config, named tensors that are read on access, a tokenizer."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import CheckpointError, clear_errors
from models.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a mapped file: its shape is known, `read()` gives the values.

    `release()` gives back the memory that the tensor's part of the file takes, once its values
    have been used. Whoever reads them again, also through an array from before, reads the disk.
    """

    shape: tuple[int, ...]
    dtype: str  # named as in the file: "BF16", "Q4_1", ...
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)
    nbytes: int  # in the file
    release: Callable[[], None] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights by their Hugging Face names, whatever the format of the file."""

    path: Path
    config: dict[str, Any]  # with the keys of a config.json: "model_type", "hidden_size", ...
    tensors: Mapping[str, LazyTensor]  # "model.layers.0.self_attn.q_proj.weight", ...
    tokenizer_loader: Callable[[], Tokenizer] = dataclasses.field(repr=False)

    def read(self, name: str) -> np.ndarray:
        """The tensor's values, read-only: float32 if they are quantized, else the stored type."""
        with clear_errors(f"{self.path}: {name!r}"):
            return self._tensor(name).read()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; reads no weights."""
        return self._tensor(name).shape

    def load_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; CheckpointError if it has none or an unsupported one."""
        with clear_errors(self.path):
            return self.tokenizer_loader()

    def _tensor(self, name: str) -> LazyTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}.")
        return self.tensors[name]
