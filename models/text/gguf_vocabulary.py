"""The vocabulary in a GGUF file's metadata: its tokens, their types, and those that end a text."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.errors import CheckpointError
from models.numbers import MOST
from models.text.eos_ids import ends_in_vocabulary

UNKNOWN = 2  # a value of tokenizer.ggml.token_type, like those of eos_ids
_ID_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, with llama.cpp's number of each token's type (none if the file has none)."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]

    @property
    def ids(self) -> dict[str, int]:
        """Ids by text."""
        return {token: i for i, token in enumerate(self.tokens)}


def read_vocabulary(fields: Mapping[str, Any], source: str) -> Vocabulary:
    """Reads the tokens and their types.

    Raises:
      CheckpointError: one is no list, has a wrong length, or a token is there twice.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type") or []
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{source}: tokenizer.ggml.tokens must be lists of texts.")
    if not isinstance(types, list) or (types and len(types) < len(tokens)):
        raise CheckpointError(
            f"{source}: tokenizer.ggml.token_type must have an entry for each token, "
            f"{len(tokens)} in all."
        )
    named = tuple(token or f"[EMPTY_{i}]" for i, token in enumerate(tokens))  # as llama.cpp
    if len(set(named)) < len(named):
        seen: set[str] = set()
        twice = next(t for t in named if t in seen or seen.add(t))
        raise CheckpointError(f"{source}: tokenizer.ggml.tokens has {twice!r} twice.")
    return Vocabulary(named, tuple(types[: len(tokens)]))


def token_id(fields: Mapping[str, Any], key: str, tokens: int, default: int | None) -> int | None:
    """The id under `tokenizer.ggml.<key>`; `default` if there is none inside the vocabulary."""
    found = fields.get(f"tokenizer.ggml.{key}")
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < tokens:
        found = default
    return found if found is not None and found < tokens else None


def gguf_eos_ids(fields: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end a generation: end of sequence, of turn, of message.

    They are those that the metadata names by id, unless they lie outside the vocabulary, and those
    of the vocabulary that are known to end a turn by their text.
    """
    named = (fields.get(f"tokenizer.ggml.{key}") for key in _ID_KEYS)
    tokens = fields.get("tokenizer.ggml.tokens")
    most = len(tokens) if isinstance(tokens, list) else MOST
    ids = [token for token in named if type(token) is int and 0 <= token < most]
    types = fields.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list):
        ids += ends_in_vocabulary(tokens, types if isinstance(types, list) else [])
    return list(dict.fromkeys(ids))
