"""Readers of published weight files: numpy only, no jax, nothing is read before it is asked for."""

from pathlib import Path

from models.checkpoints.checkpoint import Checkpoint, LazyTensor
from models.checkpoints.errors import CheckpointError
from models.checkpoints.gguf_file import open_gguf
from models.checkpoints.hf_folder import open_hf_folder

__all__ = ["Checkpoint", "CheckpointError", "LazyTensor", "open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Hugging Face folder (config.json and safetensors) or a GGUF file.

    Raises:
      CheckpointError: nothing there, another format, an unknown architecture, a damaged file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return open_hf_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder.")
    if path.suffix == ".gguf":
        return open_gguf(path)
    raise CheckpointError(
        f"{path}: must be a *.gguf file or a folder with config.json and model.safetensors."
    )
