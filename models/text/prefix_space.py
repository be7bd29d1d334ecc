"""The setting `add_prefix_space` of tokenizer_config.json, which wins over tokenizer.json's own."""

import json
from typing import Any

from models.errors import CheckpointError, import_extra

_MARK = "▁"  # stands for a space in vocabularies of SentencePiece


def with_prefix_space(backend: Any, wanted: Any, source: str) -> Any:
    """The `tokenizers.Tokenizer` that puts a space before the text, or does not.

    A byte-level tokenizer has a switch, a Metaspace a scheme; a normalizer that prepends the mark
    is left out. A tokenizer that has none of these, so that spaces are the text's own, stays.

    Args:
      backend: the tokenizer, returned as it is where it agrees.
      wanted: true, false, or None for what `backend` does.
      source: named in errors.
    """
    if wanted is None:
        return backend
    if not isinstance(wanted, bool):
        raise CheckpointError(f"{source}: add_prefix_space={wanted!r} must be true or false.")
    read = lambda part: None if part is None else json.loads(part.__getstate__())
    parts = {"normalizer": read(backend.normalizer), "pre_tokenizer": read(backend.pre_tokenizer)}
    changed = {name: _edit(part, wanted) for name, part in parts.items()}
    if changed == parts:  # the usual case: a large vocabulary is not written out
        return backend
    whole = json.loads(backend.to_str()) | changed
    return import_extra("tokenizers").Tokenizer.from_str(json.dumps(whole))


def _edit(part: Any, wanted: bool) -> Any:
    """A normalizer or pre-tokenizer with the setting; None for one that is left out."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        kept = [edited for step in part[key] if (edited := _edit(step, wanted)) is not None]
        return part | {key: kept}
    if kind == "ByteLevel":
        return part | {"add_prefix_space": wanted}
    if kind == "Metaspace" and wanted != (part.get("prepend_scheme") != "never"):
        return part | {"prepend_scheme": "first" if wanted else "never"}
    if kind == "Prepend" and part.get("prepend") == _MARK and not wanted:
        return None
    return part
