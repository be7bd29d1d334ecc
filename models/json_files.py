"""Small text and JSON files, read within bounds."""

import json
import stat
from pathlib import Path
from typing import Any

from models.errors import CheckpointError, clear_errors, one_line

# The largest published ones are tokenizer.json files of 35 MB. Python's objects for a JSON text
# can take twenty times its size.
MOST_BYTES = 64 << 20
MOST_DIGITS = 40  # of a whole number; longer ones are no numbers that anything is counted in


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; CheckpointError if it is missing, no file, or too large."""
    with clear_errors(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            raise CheckpointError(f"{path}: must be a file.")
        if status.st_size > MOST_BYTES:
            raise CheckpointError(
                f"{path}: has {status.st_size} bytes and must have at most {MOST_BYTES}."
            )
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: must be UTF-8 text: {one_line(error)}.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; CheckpointError if it holds anything else."""
    return parse_json_object(read_text(path), str(path))


def parse_json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object that a text holds; CheckpointError, which names `source`, if there is none.

    Numbers may be NaN and infinite, as Python writes them: published configs have such values
    under keys that are not read here. Whole numbers have at most `MOST_DIGITS` digits.
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: invalid JSON: {one_line(error)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: must hold a JSON object, not {type(value).__name__}.")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)
