"""Fetches a checkpoint from the Hugging Face hub, by the package `huggingface_hub`."""

import re
from collections.abc import Callable
from pathlib import Path

from models.errors import CheckpointError, clear_errors, import_extra

# What a checkpoint is read from; repositories also hold other formats of the same weights.
FILES = ("*.json", "*.jinja", "additional_chat_templates/*", "*.safetensors")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
_NAME = re.compile(rf"{_PART}/{_PART}")


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form "organisation/model"."""
    return _NAME.fullmatch(name) is not None and not name.endswith(".gguf")


def fetch_from_hub(name: str, say: Callable[[str], None] | None = None) -> Path:
    """The folder with a model's files; they are downloaded once and kept in the package's cache.

    Args:
      name: "organisation/model".
      say: called with a line before the download.

    Raises:
      CheckpointError: `huggingface_hub` is not installed, or the download failed: there is no such
        model, it needs an account, or the hub can't be reached.
    """
    try:
        hub = import_extra("huggingface_hub")
    except CheckpointError as error:
        raise CheckpointError(
            f"{name}: no such file or folder; to fetch it from the Hugging Face hub, "
            "pip install huggingface_hub."
        ) from error
    if say is not None:
        say(f"Fetching {name} from the Hugging Face hub.")
    with clear_errors(f"{name}: Hugging Face hub"):
        return Path(hub.snapshot_download(name, allow_patterns=list(FILES)))
