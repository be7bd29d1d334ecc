"""The rules that a tokenizer.json must follow before the `tokenizers` library reads it.

The library refuses most damage by itself. What is checked here makes it panic, end the process, or
take memory without a bound, none of which Python could catch.
"""

import base64
import binascii
from collections.abc import Iterator
from typing import Any

from models.errors import CheckpointError
from models.json_files import parse_json_object
from models.numbers import MOST

# A normalizer may make a text this many times longer. Published ones put one character in a
# space's place.
MOST_GROWTH = 1000
# Where a list of steps stands in a step of type "Sequence", for each kind of step.
_STEPS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def check_tokenizer_json(text: str, source: str) -> None:
    """Checks the text of a tokenizer.json; CheckpointError names `source` and the rule."""
    content = parse_json_object(text, source)
    try:
        _check_model(content.get("model"))
        _check_ids(token.get("id") for token in _dicts(content.get("added_tokens")))
        growth = 1
        for kind, step in _all_steps(content):
            if kind == "normalizer":
                growth *= _growth(step)
            _check_step(step)
        if growth > MOST_GROWTH:
            raise ValueError(f"normalizers make a text up to {growth} times longer")
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}.") from None


def _check_model(model: Any) -> None:
    """Ids must be token ids, and a merge's second part must have the prefix that is cut off."""
    if not isinstance(model, dict):
        raise ValueError("has no model")
    vocab, prefix = model.get("vocab"), model.get("continuing_subword_prefix")
    if isinstance(vocab, dict):
        _check_ids(vocab.values())
    if not isinstance(prefix, str) or not prefix:
        return
    merges = model.get("merges")
    for merge in merges if isinstance(merges, list) else ():
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not str(pair[1]).startswith(prefix):
            raise ValueError(f"the second part of merge {merge!r} must start with {prefix!r}")


def _check_ids(ids: Any) -> None:
    for token in ids:
        if type(token) is not int or not 0 <= token <= MOST:
            raise ValueError(f"a token id must be a whole number from 0 to {MOST}, not {token!r}")


def _all_steps(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All steps of a text's way to ids and back, with their kinds; sequences are gone through."""
    rest = [(kind, content.get(kind)) for kind in _STEPS]
    while rest:
        kind, step = rest.pop()
        if not isinstance(step, dict):
            continue
        yield kind, step
        inner = step.get(_STEPS[kind])
        rest += [(kind, one) for one in inner] if isinstance(inner, list) else []


def _growth(step: dict[str, Any]) -> int:
    """How many times longer a normalizer can make a text."""
    added = step.get("content", step.get("prepend"))
    return max(len(added), 1) + ("prepend" in step) if isinstance(added, str) else 1


def _check_step(step: dict[str, Any]) -> None:
    kind = step.get("type")
    if kind == "Precompiled":
        _check_charsmap(step.get("precompiled_charsmap"))
    elif kind == "FixedLength" and (type(step.get("length")) is not int or step["length"] < 1):
        raise ValueError(f"the length of pieces must be at least 1, not {step.get('length')!r}")
    elif kind == "TemplateProcessing":
        known = step.get("special_tokens")
        for part in (*_dicts(step.get("single")), *_dicts(step.get("pair"))):
            token = part.get("SpecialToken")
            name = token.get("id") if isinstance(token, dict) else None
            if isinstance(name, str) and isinstance(known, dict) and name not in known:
                raise ValueError(f"the post-processor names an unknown special token {name!r}")


def _check_charsmap(text: Any) -> None:
    """SentencePiece's table: the size of a trie in bytes, the trie, and the texts it leads to."""
    try:
        table = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except binascii.Error:
        table = b""
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or not 0 < size <= len(table) - 4:
        raise ValueError(f"precompiled_charsmap is damaged: {len(table)} bytes for {size}")


def _dicts(value: Any) -> list[dict[str, Any]]:
    """The dicts in a list; none if it is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
