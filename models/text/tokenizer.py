"""Text to token ids and back, for whole texts and for text that arrives token by token.

The work is done by the `tokenizers` library. `hf_tokenizer` and `gguf_tokenizer` build a
`Tokenizer` from what a checkpoint holds.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.errors import CheckpointError, library_errors, one_line
from models.text.chat_template import render_chat

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, with the special tokens and the chat template that a generation needs."""

    backend: Any = dataclasses.field(repr=False)  # tokenizers.Tokenizer
    source: str  # the file or folder it was read from, named in errors
    eos_ids: tuple[int, ...]  # each of them ends a generation
    bos_id: int | None
    adds_bos: bool  # encode puts bos_id first
    chat_templates: Mapping[str, str] = dataclasses.field(repr=False)  # by name: "default", ...
    special_tokens: Mapping[str, str]  # "bos_token", "eos_token", ... for the chat template

    @property
    def vocab_size(self) -> int:
        """Every id is below this number. Added tokens count; padding of the embedding does not."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written in it ("<|im_start|>") are recognised.

        If the checkpoint asks for a BOS, it comes first, except where `text` already starts with
        it (chat templates write it themselves). No EOS is added.

        Raises:
          CheckpointError: the tokenizer can't cut this text, as where one of its regular
            expressions takes too many tries.
        """
        with library_errors(self.source):
            ids = self.backend.encode(text, add_special_tokens=False).ids
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Invalid UTF-8 becomes U+FFFD; ids past the vocabulary give no text."""
        with library_errors(self.source):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> "TextStream":
        """An incremental `decode`, for printing a generation while it runs."""
        return TextStream(self, skip_special)

    def apply_chat(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """Renders a conversation as the prompt of the assistant's next turn.

        Args:
          messages: dicts with "role", "content" and any other key that the template reads.
          **variables: of the template: `tools=[...]`, gpt-oss's `reasoning_effort="low"`, Qwen3's
            `enable_thinking=False`, `add_generation_prompt=False`.

        Raises:
          CheckpointError: there is no chat template, it is broken, refuses these messages, or
            does not read one of `variables`.
        """
        # Some models have a template of its own for conversations with tools.
        names = ("tool_use", "default") if variables.get("tools") else ("default",)
        template = next((self.chat_templates[n] for n in names if n in self.chat_templates), None)
        if template is None:
            known = ", ".join(sorted(self.chat_templates))
            has = f"has only the chat templates {known}" if known else "has no chat template"
            raise CheckpointError(f"{self.source}: {has}; use a plain prompt.")
        return render_chat(
            template,
            messages,
            special_tokens=self.special_tokens,
            source=self.source,
            variables=variables,
        )


class TextStream:
    """Decodes ids as they arrive: all pushes and the flush, joined, equal `decode` of all ids.

    Text is held back while its last character may be incomplete. A push decodes only the ids
    since the last output again, together with the few ids before them as context.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        added = tokenizer.backend.get_added_tokens_decoder().items()
        self._hidden = {i for i, token in added if token.special and skip_special}
        self._context: list[int] = []  # the last ids whose text has been returned
        self._held: list[int] = []  # ids whose text has not been returned yet

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that is complete by then, often empty."""
        to_token = self._tokenizer.backend.id_to_token
        visible = (int(i) for i in ids if int(i) not in self._hidden)
        self._held += [i for i in visible if to_token(i) is not None]
        if not self._held:
            return ""
        text = self._new_text()
        # A run of byte tokens is decoded as a whole, so wait for the token that ends the run.
        in_bytes = _BYTE_TOKEN.fullmatch(to_token(self._held[-1]))
        if not text or text.endswith("\ufffd") or in_bytes:
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """Returns the text held back so far; an incomplete character becomes U+FFFD."""
        text = self._new_text()
        self._context, self._held = self._context + self._held, []
        return text

    def _new_text(self) -> str:
        decode = lambda ids: self._tokenizer.decode(ids, skip_special=self._skip_special)
        return decode(self._context + self._held)[len(decode(self._context)) :]


def call_tokenizers(source: str, build: Callable[..., Any], *args: Any) -> Any:
    """`build(*args)`; any failure becomes a CheckpointError that names `source`.

    The `tokenizers` library raises plain `Exception` for damaged input, so nothing narrower can
    be caught.
    """
    with library_errors(source):
        try:
            return build(*args)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{source}: unusable tokenizer: {one_line(error)}.") from error
