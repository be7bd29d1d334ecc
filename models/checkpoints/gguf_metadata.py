"""Typed values of a GGUF file's metadata, with errors that name the file and the key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import CheckpointError
from models.numbers import positive_number, whole_number

# Keys, without the architecture, that change what is computed and that no supported one has, and
# the values that change nothing.
_FOREIGN: dict[str, tuple] = {
    "attention.scale": (0, 0.0),
    "attention.clamp_kqv": (0, 0.0),
    "attention.max_alibi_bias": (0, 0.0),
    "attention.causal": (True,),
    "attention.chunk_size": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0, 0.0),
    "logit_scale": (0, 0.0, 1),
    "residual_scale": (0, 0.0, 1),
    "embedding_scale": (0, 0.0, 1),
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.alpha": (0,),
}


class Metadata:
    """The metadata of one file; keys are those of its architecture ("block_count")."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path, self.fields = path, fields
        self.arch = fields["general.architecture"]

    def get(self, key: str) -> Any:
        """The value as it is; None if there is none."""
        return self.fields.get(f"{self.arch}.{key}")

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        """A positive number; if the file gives one per layer, all layers must have the same."""
        full = f"{self.arch}.{key}"
        value = self.fields.get(full, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{self.path}: {full} must be a positive number, not {value!r}.")
        name = f"{self.path}: {full}"
        if kind is int:
            return whole_number(name, int(value) if value % 1 == 0 else value)
        # Metadata floats are float32: 9.999999747378752e-06 stands for 1e-05.
        return float(str(np.float32(positive_number(name, value))))

    def has(self, key: str) -> bool:
        """Whether a key is there with a value other than 0, false and empty."""
        return bool(self.get(key))

    def refuse(self, what: str) -> None:
        """Raises the error that `what`, ending in "is" or "are", is not supported."""
        raise CheckpointError(f"{self.path}: {what} not supported in GGUF files.")

    def refuse_foreign_keys(self) -> None:
        """Raises the error for the first key that the architecture can't follow."""
        if self.has("expert_count"):
            self.refuse("mixtures of experts are")
        for key, neutral in _FOREIGN.items():
            value = self.get(key)
            if value is not None and value not in neutral:
                self.refuse(f"{self.arch}.{key}={value!r} is")
