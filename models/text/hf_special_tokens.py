"""Special tokens of a Hugging Face folder: which texts are tokens, and with which flags."""

from collections.abc import Mapping
from typing import Any

from models.errors import CheckpointError, import_extra
from models.text.tokenizer import call_tokenizers

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LISTS = ("additional_special_tokens", "extra_special_tokens")  # lists, or objects by name


def special_texts(named: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the tokens with a role, by role ("bos_token"), from the config files' keys."""
    texts = {key: _token_text(value) for key, value in named.items() if key.endswith("_token")}
    return {key: text for key, text in texts.items() if text is not None}


def add_special_tokens(
    backend: Any, named: Mapping[str, Any], by_text: Mapping[str, Any], source: str
) -> None:
    """Adds to a `tokenizers.Tokenizer` the tokens that only the config files mark, as transformers.

    Args:
      backend: the tokenizer to add them to.
      named: keys of special_tokens_map.json and tokenizer_config.json. "added_tokens_decoder",
        `{"106": {"content": "<end_of_turn>", ...}}`, has flags that win over tokenizer.json's.
      by_text: content of added_tokens.json, `{"<end_of_turn>": 106}`, which old folders have; it
        counts where there is no "added_tokens_decoder".
      source: the folder, named in errors.

    Raises:
      CheckpointError: an entry is malformed or contradicts tokenizer.json.
    """
    listed = named.get("added_tokens_decoder")
    if not listed and isinstance(by_text, dict):
        known = {text for text in by_text if backend.token_to_id(text) == by_text[text]}
        listed = {i: {"content": text} for text, i in by_text.items() if text not in known}
    tokens = call_tokenizers(f"{source}: added_tokens_decoder", _read_listed, listed)
    backend.add_tokens(list(tokens.values()))
    for i, token in tokens.items():
        actual = backend.token_to_id(token.content)
        if actual != i:
            raise CheckpointError(
                f"{source}: added_tokens_decoder says that {token.content!r} is token {i}, "
                f"in tokenizer.json it is {actual}."
            )
    # A token with a role may still be an ordinary word of the vocabulary: mark it as special.
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    special = call_tokenizers(f"{source}: special tokens", _read_roles, named)
    new = [special[text] for text in sorted(special.keys() - added)]
    backend.add_special_tokens([t for t in new if backend.token_to_id(t.content) is not None])


def _read_listed(listed: Any) -> dict[int, Any]:
    """The entries of "added_tokens_decoder", in the order of their ids."""
    entries = sorted((listed or {}).items(), key=lambda item: int(item[0]))
    return {int(i): _make_token(token["content"], token) for i, token in entries}


def _read_roles(named: Mapping[str, Any]) -> dict[str, Any]:
    """Every token that the configs name as special, by its text."""
    values = [value for key, value in named.items() if key.endswith("_token")]
    for key in _LISTS:
        more = named.get(key) or []
        values += list(more.values()) if isinstance(more, dict) else list(more)
    return {
        text: _make_token(text, value if isinstance(value, dict) else {})
        for value in values
        if (text := _token_text(value)) is not None
    }


def _make_token(text: str, entry: Mapping[str, Any]) -> Any:
    given = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
    return import_extra("tokenizers").AddedToken(text, **given)


def _token_text(token: Any) -> str | None:
    """A special token's text; configs write it as a string or as {"content": ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
