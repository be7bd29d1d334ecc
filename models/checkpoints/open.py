"""Opens published weights, by path or by name."""

from collections.abc import Callable
from pathlib import Path

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.fetch_smollm2 import fetch_smollm2
from models.checkpoints.gguf_file import open_gguf
from models.checkpoints.hf_folder import open_hf_folder
from models.checkpoints.hub import fetch_from_hub, is_hub_name
from models.errors import CheckpointError, clear_errors

NAMES = {"smollm2": fetch_smollm2}  # models that can be had by name, and how each is fetched


def open_checkpoint(
    path_or_name: str | Path, *, say: Callable[[str], None] | None = None
) -> Checkpoint:
    """Opens a Hugging Face folder (config.json and safetensors), a GGUF file, or a named model.

    Args:
      path_or_name: where the weights are, a key of `NAMES` ("smollm2"), or, if there is no such
        path, a model of the Hugging Face hub ("organisation/model"). A named model is fetched once
        and kept.
      say: called with lines that report the progress of a fetch.

    Raises:
      CheckpointError: nothing is there, the format or architecture is unknown, a file is damaged,
        or a fetch failed. The message is one line that names the file.
    """
    fetch = NAMES.get(str(path_or_name))
    source = path_or_name if fetch is None else fetch(say)
    with clear_errors(source):
        path = Path(source).expanduser()
        if not path.exists() and is_hub_name(str(source)):
            path = fetch_from_hub(str(source), say)
        return _open(path)


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return open_hf_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder.")
    if path.suffix == ".gguf":
        return open_gguf(path)
    raise CheckpointError(
        f"{path}: must be a *.gguf file or a folder with config.json and model.safetensors."
    )
