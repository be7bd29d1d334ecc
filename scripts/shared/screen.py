"""Shows answers as they come: of one prompt the text, of several how far the first has come."""

from collections.abc import Sequence
from typing import Any

from rich.status import Status

import jaxkv


class IdStream:
    """Shows tokens by their ids: random weights have no tokenizer."""

    def push(self, tokens: Sequence[int]) -> str:
        """Takes the next ids; returns them as text."""
        return "".join(f"{token} " for token in tokens)

    def flush(self) -> str:
        """Nothing is held back."""
        return ""


class Screen:
    """Shows one prompt's answer as it comes, of several only how far the first has come.

    Args:
      streams: what turns each prompt's tokens into text, by `push(tokens)` and `flush()`.
      stop_text: strings that end an answer and are not shown.
      min_tokens: no string ends an answer before it has this many tokens.
      status: the line that says what is being done.
    """

    def __init__(
        self,
        streams: Sequence[Any],
        stop_text: jaxkv.StopText | None,
        min_tokens: int,
        status: Status,
    ):
        self.streams, self.stop_text, self.min_tokens = streams, stop_text, min_tokens
        self.status = status
        self.alone = len(streams) == 1
        self.texts = [""] * len(streams)
        self.tokens = [0] * len(streams)
        self.passed = [0] * len(streams)  # characters before min_tokens
        self.shown = 0  # characters of the only answer that are on the screen

    def prefilled(self, done: int, of: int) -> None:
        """Prompt tokens are in the cache."""
        self.status.update(f"prefill {done}/{of} tokens")

    def show(self, new: list[list[int]]) -> None:
        """Every prompt's next tokens are there."""
        for number, tokens in enumerate(new):
            for token in tokens:
                self.texts[number] += self.streams[number].push([token])
                self.tokens[number] += 1
                if self.tokens[number] < self.min_tokens:
                    self.passed[number] = len(self.texts[number])
        text = self.texts[0]
        if self.alone:
            self.status.stop()
            # The end of the text may be the beginning of a string that stops.
            strings = () if self.stop_text is None else self.stop_text.strings
            self._print(len(text) - max((len(string) - 1 for string in strings), default=0))
        else:
            self.status.update(f"prompt 0, {len(text)} characters: …{text[-60:]!r}")

    def finish(self, texts: Sequence[str]) -> list[str]:
        """Prints the rest, several answers below their prompts; returns the answers."""
        for number, stream in enumerate(self.streams):
            self.texts[number] += stream.flush()
        outputs = [self._answer(number) for number in range(len(self.texts))]
        if self.alone:
            self._print(len(outputs[0]))
            print()
        else:
            for number, (text, output) in enumerate(zip(texts, outputs, strict=True)):
                print(f"--- {number}: {text[:60]!r} ---\n{output}")
        return outputs

    def _answer(self, number: int) -> str:
        """An answer's text so far, before the string that ends it."""
        text = self.texts[number]
        return text if self.stop_text is None else self.stop_text.cut(text, self.passed[number])

    def _print(self, stop: int) -> None:
        """Shows the only answer up to character `stop`."""
        print(self._answer(0)[self.shown : stop], end="", flush=True)
        self.shown = max(self.shown, stop)
