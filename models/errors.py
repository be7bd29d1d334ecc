"""`CheckpointError`, and small helpers that turn a failure into one of its one-line messages."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint can't be used. The message is one line: the file, the rule, the value found."""


def import_extra(name: str) -> ModuleType:
    """Imports an optional package.

    Raises:
      CheckpointError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise CheckpointError(
            f"This needs the package {package!r}: pip install 'jaxkv[models]' ({one_line(error)})."
        ) from error


def one_line(error: object, limit: int = 300) -> str:
    """An error's text on one line, at most `limit` characters long, without a final full stop."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; CheckpointError if it is missing or can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: must be UTF-8 text: {one_line(error)}.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; CheckpointError if it holds anything else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: invalid JSON: {one_line(error)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}.")
    return value
