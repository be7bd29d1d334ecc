"""Texts that scripts score: a file, or chapters of the Python reference that ship with Python."""

import hashlib
import importlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PYTHON = "python"  # stands for the packaged text

# 16,000 tokens of prose rather than grammar.
CHAPTERS = ("objects", "execmodel", "types", "customization")


class Text(NamedTuple):
    """A text and where it is from."""

    text: str
    source: str
    name: str  # a short one, for tables

    @property
    def sha256(self) -> str:
        """Of the text as UTF-8: tells which text was scored, as chapters differ between Pythons."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: Path | None, chapters: Sequence[str] = CHAPTERS) -> Text:
    """The file's text, or without a path those chapters of the Python reference.

    Raises:
      ValueError: unreadable, not UTF-8, empty; or this Python lacks the chapters.
    """
    if path is None:
        return _packaged(chapters)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--text {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"--text {path}: must be UTF-8 text.") from None
    if not text.strip():
        raise ValueError(f"--text {path}: is empty.")
    return Text(text, str(path), path.name)


def read_texts(names: Sequence[str]) -> list[Text]:
    """The texts of `--text`: files, or "python" for the packaged one, each with its own name.

    Raises:
      ValueError: a text can't be read, or is named twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--text {name} is given twice.")
    texts = [read_text(None if name == PYTHON else Path(name)) for name in names]
    short = [text.name for text in texts]
    return [
        text._replace(name=text.source) if short.count(text.name) > 1 else text for text in texts
    ]


def first_tokens(text: Text, tokenizer, count: int) -> np.ndarray:
    """The text's first `count` tokens, `i32[count]`; ValueError if it has fewer."""
    tokens = np.asarray(tokenizer.encode(text.text)[:count], np.int32)
    if len(tokens) < count:
        raise ValueError(f"{text.source} has {len(tokens)} tokens, fewer than --tokens {count}.")
    return tokens


def _packaged(chapters: Sequence[str]) -> Text:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
        text = "\n\n".join(topics[name] for name in chapters)
    except (ImportError, KeyError) as error:
        raise ValueError(f"this Python has no pydoc topics ({error}): give --text FILE.") from None
    names = ", ".join(chapters)
    source = f"pydoc_data.topics ({names}) of Python {platform.python_version()}"
    return Text(text, source, PYTHON)
