"""Rotary settings of a GGUF file, as the `rope_parameters` of a config.json."""

from collections.abc import Callable
from typing import Any

import numpy as np

from models.checkpoints.gguf_header import TensorEntry
from models.checkpoints.gguf_metadata import Metadata
from models.errors import CheckpointError


def read_gguf_rope(
    metadata: Metadata,
    factors: TensorEntry | None,
    read_values: Callable[[TensorEntry], np.ndarray],
    head_dim: int,
) -> dict[str, Any]:
    """Reads the base and the scaling.

    Args:
      metadata: of the file. One that names no type of scaling means a linear one, if it gives a
        factor, as llama.cpp reads it.
      factors: the tensor of divisors, one per frequency, as which Llama 3's scaling comes.
      read_values: reads `factors`.
      head_dim: channels that are rotated.
    """
    theta = metadata.number("rope.freq_base", float, 10000.0)
    kind = metadata.fields.get(f"{metadata.arch}.rope.scaling.type", "linear")
    if kind == "yarn" and metadata.has("rope.scaling.factor") and factors is None:
        return {"rope_type": "yarn", "rope_theta": theta} | _yarn(metadata)
    if kind not in ("none", "linear"):
        metadata.refuse(f"rope scaling {kind!r} is")
    older = metadata.number("rope.scale_linear", float, 1.0)
    linear = metadata.number("rope.scaling.factor", float, older) if kind == "linear" else 1.0
    if factors is None:
        if linear == 1.0:
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": "linear", "rope_theta": theta, "factor": linear}
    if factors.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{metadata.path}: {factors.name}: shape {factors.shape} must be ({head_dim // 2},)."
        )
    values = read_values(factors).astype(np.float64) * linear
    return {"rope_type": "factors", "rope_theta": theta, "factors": values.tolist()}


def _yarn(metadata: Metadata) -> dict[str, Any]:
    """YaRN's parameters; without a trained context it is the file's whole context."""
    context = metadata.number("context_length", int)
    return {
        "factor": metadata.number("rope.scaling.factor", float),
        "original_max_position_embeddings": metadata.number(
            "rope.scaling.original_context_length", int, context
        ),
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", float, 1.0),
    }
