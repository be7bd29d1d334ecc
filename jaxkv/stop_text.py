"""Strings that end an answer, found in its text wherever tokens begin and end."""

import dataclasses
from collections.abc import Callable, Sequence

# A character takes at most 4 tokens (one per byte of UTF-8), and the first characters of a decoded
# tail can differ from those of the whole text (half a character, a stripped space).
TOKENS_PER_CHARACTER, MARGIN = 4, 16


@dataclasses.dataclass(frozen=True)
class StopText:
    """Ends an answer as soon as its text has one of the strings.

    The token that completes a string is the answer's last one. Strings are looked for on the host
    after each block of decode steps.

    Attributes:
      strings: none of them empty.
      decode: turns token ids into text, for example a tokenizer's `decode`.
    """

    strings: Sequence[str]
    decode: Callable[[list[int]], str]

    def checked(self) -> "StopText":
        """Returns itself; raises ValueError naming what is wrong."""
        if isinstance(self.strings, str) or not isinstance(self.strings, Sequence):
            raise ValueError(f"stop_text must have a list of strings, not {self.strings!r}.")
        if not self.strings:
            raise ValueError("stop_text has no strings: give at least one, or stop_text=None.")
        for string in self.strings:
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop_text has {string!r}: each must be text, and not empty.")
        if not callable(self.decode):
            raise ValueError(f"stop_text.decode={self.decode!r} must be a function of token ids.")
        return self

    def find(self, tokens: list[int], new: int, least: int = 0) -> int | None:
        """Tokens up to the one that first completes a string; None if none does.

        Args:
          tokens: the whole answer.
          new: how many of the last tokens have not been searched yet.
          least: strings that are complete before the answer has this many tokens are passed over.
        """
        longest = max(len(string) for string in self.strings)
        searched = max(len(tokens) - new, least - 1)
        begin = max(0, searched - TOKENS_PER_CHARACTER * longest - MARGIN)
        passed = self._length(tokens[begin:searched])
        ends = lambda stop: self._place(self.decode(tokens[begin:stop]), passed) is not None
        if searched >= len(tokens) or not ends(len(tokens)):
            return None
        return next(stop for stop in range(searched + 1, len(tokens) + 1) if ends(stop))

    def text(self, tokens: list[int], least: int = 0) -> str:
        """The answer's text, up to the string that ends it."""
        return self.cut(self.decode(tokens), self._length(tokens[: max(0, least - 1)]))

    def cut(self, text: str, passed: int = 0) -> str:
        """The text before the first string that ends behind the first `passed` characters."""
        return text[: self._place(text, passed)]

    def _length(self, tokens: list[int]) -> int:
        """Characters of the tokens' text that further tokens don't change."""
        return len(self.decode(tokens).rstrip("\ufffd"))  # half a character, when decoded

    def _place(self, text: str, passed: int) -> int | None:
        """Where the first string begins that ends behind the first `passed` characters."""
        starts = (text.find(s, max(0, passed - len(s) + 1)) for s in self.strings)
        return min((start for start in starts if start >= 0), default=None)
