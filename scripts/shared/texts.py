"""Texts that scripts score: a file, or chapters of the Python reference that ship with Python."""

import hashlib
import importlib
import platform
from pathlib import Path
from typing import NamedTuple

# Prose rather than grammar, 16,000 tokens. `objects` and `execmodel` are what the streaming
# evaluation starts with; nothing is calibrated on them.
CHAPTERS = ("objects", "execmodel", "types", "customization")


class Text(NamedTuple):
    """A text and where it is from."""

    text: str
    source: str

    @property
    def sha256(self) -> str:
        """Of the text as UTF-8: what pins it, as Python's chapters differ by its version."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: Path | None) -> Text:
    """The file's text, or the packaged one without a path.

    Raises:
      ValueError: unreadable, not UTF-8, empty; or this Python lacks the chapters.
    """
    if path is None:
        return _packaged()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--text {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"--text {path}: must be UTF-8 text.") from None
    if not text.strip():
        raise ValueError(f"--text {path}: is empty.")
    return Text(text, str(path))


def _packaged() -> Text:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
        text = "\n\n".join(topics[name] for name in CHAPTERS)
    except (ImportError, KeyError) as error:
        raise ValueError(f"this Python has no pydoc topics ({error}): give --text FILE.") from None
    names = ", ".join(CHAPTERS)
    return Text(text, f"pydoc_data.topics ({names}) of Python {platform.python_version()}")
