"""Reads the answers of gpt-oss token by token. They are in OpenAI's harmony format.

An answer is a series of messages, each with a header that names a channel, and a text:
`<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>`
has two messages. Prompts are not written here; the chat template writes them.
"""

import dataclasses
import re
from collections.abc import Sequence

from models.text.tokenizer import TextStream, Tokenizer

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")  # end a message, a tool call, the answer
_MARKS = (_START, _CHANNEL, _MESSAGE, *_ENDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One message of an answer."""

    channel: str = ""  # "analysis" (reasoning), "commentary" (tool calls), "final"; "" if unnamed
    recipient: str | None = None  # the tool that is called ("functions.weather")
    text: str = ""


def answer_stream(tokenizer: Tokenizer, prompt: Sequence[int]) -> "TextStream | HarmonyStream":
    """A stream for the answer to `prompt`: a `HarmonyStream` if the vocabulary has its tokens."""
    harmony = all(tokenizer.backend.token_to_id(mark) is not None for mark in _MARKS)
    return HarmonyStream(tokenizer, prompt) if harmony else tokenizer.stream()


class HarmonyStream:
    """Decodes an answer as it arrives, with the interface of `TextStream`.

    The returned text has a line like "[analysis]" or "[commentary to functions.weather]" before
    each message, and an empty line between two messages; `messages` holds them separately. A
    header that never reaches its `<|message|>` is returned as text, so that nothing the model says
    is lost.

    Args:
      tokenizer: its vocabulary must have the harmony tokens.
      prompt: the ids before the answer. If they end inside a header or a text, the answer
        continues it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        to_id = tokenizer.backend.token_to_id
        self._tokenizer = tokenizer
        self._marks = {to_id(mark): mark for mark in _MARKS}
        self._stream = tokenizer.stream()
        self._header: list[int] | None = None  # ids of the header so far; None inside a text
        self._done: list[Message] = []
        self._open: Message | None = None
        start = next((n for n in reversed(range(len(prompt))) if prompt[n] == to_id(_START)), None)
        self._gap = ""  # printed before the next output
        if start is not None:
            self.push(prompt[start:])
            self._open = self._open and dataclasses.replace(self._open, text="")
            self._done, self._gap = [], ""

    @property
    def messages(self) -> list[Message]:
        """The messages so far. Of a text that the prompt began only the answer's part is there."""
        return self._done + ([] if self._open is None else [self._open])

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that is complete by then, often empty."""
        return "".join([self._push_one(int(i)) for i in ids])

    def flush(self) -> str:
        """Returns the text held back so far: the end of a text, or a header that was cut off."""
        if self._header is None:
            return self._say(self._stream.flush())
        header = self._tokenizer.decode(self._header, skip_special=False)
        self._header = None
        return self._say(header.removeprefix("assistant"))  # the role alone is not worth showing

    def _push_one(self, i: int) -> str:
        mark = self._marks.get(i)
        in_header = self._header is not None
        if mark == _START or mark in _ENDS or (mark == _CHANNEL and not in_header):
            rest = self.flush()
            self._done, self._open = self.messages, None
            self._gap = "\n\n" if self._done else ""
            self._header = [i] if mark == _CHANNEL else []
            return rest
        if mark == _MESSAGE and in_header:
            return self._begin()
        if self._header is not None:
            self._header.append(i)
            return ""
        return self._say(self._stream.push([i]))

    def _begin(self) -> str:
        """Opens a message with the channel and recipient of the header; returns its heading."""
        header = self._tokenizer.decode(self._header or [], skip_special=False)
        self._header, self._stream = None, self._tokenizer.stream()
        name = re.search(r"<\|channel\|>\s*(\w+)", header)
        to = re.search(r"\bto=([^\s<]+)", header)  # after the role or after the channel
        channel, recipient = name and name.group(1), to and to.group(1)
        heading = f"{channel or 'message'} to {recipient}" if recipient else channel
        self._open = Message(channel=channel or "", recipient=recipient)
        return self._print(f"[{heading}]\n") if heading else ""

    def _say(self, text: str) -> str:
        """Adds `text` to the open message, or opens an unnamed one; returns the text to print."""
        if not text:
            return ""
        message = self._open or Message()
        self._open = dataclasses.replace(message, text=message.text + text)
        return self._print(text)

    def _print(self, text: str) -> str:
        """Puts the pending gap before `text`."""
        gap, self._gap = self._gap, ""
        return gap + text
