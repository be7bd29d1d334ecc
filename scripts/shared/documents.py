"""Documents that a cache is measured on: token ids, and which predictions count."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scripts.shared.texts import Text


class Document(NamedTuple):
    """Tokens to read into an empty cache, and the predictions that count.

    Prediction `r` is that of `tokens[r + 1]`, made when `tokens[: r + 1]` have been read. The last
    token is predicted and never read, so that a document of `length + 1` tokens ends with `length`
    tokens in the cache.
    """

    tokens: np.ndarray  # i32[length + 1]
    rows: np.ndarray  # i32[n], the predictions that count, ascending
    # i32[n, choices], tokens among which each prediction picks the likeliest; choices == 0 stands
    # for the whole vocabulary
    choices: np.ndarray
    whole: bool  # whether the document counts as right only if all its predictions are right

    @property
    def length(self) -> int:
        """Tokens in the cache once the document has been read."""
        return len(self.tokens) - 1


class Source(NamedTuple):
    """Documents of one kind and length: a text's, or a task's."""

    kind: str  # "text" or "task"
    name: str
    length: int  # tokens in the cache once a document has been read
    documents: Sequence[Document]
    chance: float | None = None  # a task's accuracy by guessing among the choices


def start_tokens(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before every text: a BOS, or none."""
    return tokenizer.encode("")


def cut_text(text: Text, tokenizer, length: int, count: int) -> Source:
    """The first `count` documents of `length` tokens in the cache, one behind the other.

    Each starts as a text of its own does, with a BOS where the tokenizer adds one.

    Raises:
      ValueError: the text is too short.
    """
    start = start_tokens(tokenizer)
    tokens = tokenizer.encode(text.text)[len(start) :]
    step = length - len(start)
    if step < 1:
        raise ValueError(f"--lengths {length} must be at least {1 + len(start)}.")
    if len(tokens) < count * step + 1:
        raise ValueError(
            f"{text.source} has {len(tokens)} tokens, fewer than --documents {count} of "
            f"--lengths {length} take."
        )
    pieces = [tokens[n * step : (n + 1) * step + 1] for n in range(count)]
    documents = [
        Document(
            tokens=np.asarray([*start, *piece], np.int32),
            rows=np.arange(length, dtype=np.int32),
            choices=np.zeros((length, 0), np.int32),
            whole=False,
        )
        for piece in pieces
    ]
    return Source("text", text.name, length, documents)
