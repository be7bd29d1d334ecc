"""Flax NNX decoders over jaxkv caches, and what loads them from published checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from models.checkpoints import Checkpoint as Checkpoint
from models.checkpoints import CheckpointError as CheckpointError
from models.checkpoints import open_checkpoint as _open_path
from models.config import DecoderConfig as DecoderConfig
from models.decoder import Decoder as Decoder
from models.loaders import Progress, load_decoder
from models.loaders import architecture_config as architecture_config
from models.random_weights import draw_decoder, named_shape
from models.smollm2 import fetch_smollm2

NAMES = {"smollm2": fetch_smollm2}  # models that can be had by name


def open_checkpoint(
    path_or_name: str | Path, *, say: Callable[[str], None] | None = None
) -> Checkpoint:
    """Opens weights by path (a Hugging Face folder or a GGUF file) or by name ("smollm2").

    Args:
      path_or_name: where they are; a name is fetched once and kept.
      say: told, in a line each, what a fetch does.

    Raises:
      CheckpointError: one line: what is wrong with which file.
    """
    fetch = NAMES.get(str(path_or_name))
    return _open_path(path_or_name if fetch is None else fetch(say))


def load(
    source: str | Path | Checkpoint,
    *,
    dtype: str | None = None,
    scan: bool | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Loads a model.

    Args:
      source: path, name, or a checkpoint that is already open.
      dtype: of weights and activations; None for float32 on a CPU, bfloat16 elsewhere.
      scan: scan over stacked layers (compile time does not grow with depth) or unroll them;
        None unrolls except on a TPU: on CPUs and GPUs a scan copies each layer's weights before
        it reads them (more than half of a decode step on an H100).
      progress: called with (bytes of the file read, of how many).

    Raises:
      CheckpointError: one line: what is wrong with which file or tensor.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return load_decoder(checkpoint, progress=progress, **_by_platform(dtype, scan))


def random_model(shape: str, *, dtype: str | None = None, scan: bool | None = None) -> Decoder:
    """Makes a model of random weights, for measuring speed without a checkpoint.

    Args:
      shape: "llama3-8b", "llama3-1b" or "tiny".
      dtype: as in `load`.
      scan: as in `load`.

    Raises:
      ValueError: there is no such shape.
    """
    return draw_decoder(named_shape(shape), **_by_platform(dtype, scan))


def _by_platform(dtype: str | None, scan: bool | None) -> dict[str, Any]:
    """What `load` promises for None."""
    platform = jax.default_backend()
    return {
        "dtype": dtype or ("float32" if platform == "cpu" else "bfloat16"),
        "scan": platform == "tpu" if scan is None else scan,
    }
