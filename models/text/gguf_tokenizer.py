"""Builds a `Tokenizer` from the metadata of a GGUF file: byte-level BPE or SentencePiece."""

import math
from collections.abc import Mapping
from typing import Any

from models.errors import CheckpointError, clear_errors, import_extra
from models.text.eos_ids import CONTROL, USER_DEFINED
from models.text.gguf_pre_splits import PRE_SPLITS, PreSplit
from models.text.gguf_vocabulary import (
    UNKNOWN,
    Vocabulary,
    gguf_eos_ids,
    read_vocabulary,
    token_id,
)
from models.text.spm import sentencepiece_bpe
from models.text.tokenizer import Tokenizer, call_tokenizers

# Of a SentencePiece token. The time to list its pairs grows with the square; published ones have
# up to 31 in words and 256 in runs of spaces.
MOST_CHARACTERS = 1024
_DEFAULT_IDS = {  # by `model`; where a file does not give them
    "gpt2": {"bos": None, "eos": None, "unk": None, "pad": None},
    "llama": {"bos": 1, "eos": 2, "unk": 0, "pad": None},
}
_ID_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id"}
_ID_KEYS["pad"] = "padding_token_id"


def read_gguf_tokenizer(fields: Mapping[str, Any], *, source: str = "GGUF") -> Tokenizer:
    """Builds a tokenizer that gives llama.cpp's ids for the file.

    Args:
      fields: metadata as Python values, by full key ("tokenizer.ggml.tokens").
      source: the file, named in errors.

    Raises:
      CheckpointError: the metadata has no tokenizer, one of another kind, or a damaged one.
    """
    with clear_errors(source):
        return _read(fields, source)


def _read(fields: Mapping[str, Any], source: str) -> Tokenizer:
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items()}
    kind, pre = keys.get("model"), keys.get("pre") or "default"
    if (
        not isinstance(kind, str)
        or kind not in _DEFAULT_IDS
        or (kind == "gpt2" and (not isinstance(pre, str) or pre not in PRE_SPLITS))
    ):
        what = f"pre-tokenizer {pre!r}" if kind == "gpt2" else f"tokenizer {kind!r}"
        raise CheckpointError(
            f"{source}: {what} is not supported; give token ids or use a tokenizer.json."
        )
    vocabulary = read_vocabulary(fields, source)
    tokens = vocabulary.tokens
    ids = {
        role: token_id(fields, key, len(tokens), _DEFAULT_IDS[kind][role])
        for role, key in _ID_KEYS.items()
    }
    if kind == "gpt2":
        adds_bos = PRE_SPLITS[pre].adds_bos
        backend = _read_byte_bpe(keys, vocabulary, PRE_SPLITS[pre], source)
    else:
        adds_bos = True
        backend = _read_sentencepiece(keys, vocabulary, ids["unk"], source)
    eos_ids = gguf_eos_ids({"tokenizer.ggml.eos_token_id": ids["eos"], **fields})
    _add_tokens(backend, vocabulary, set(eos_ids))
    if (given := _flag(keys, "add_bos_token", None, source)) is not None:
        adds_bos = given
        if adds_bos and ids["bos"] is None:
            raise CheckpointError(f"{source}: add_bos_token is true, but no bos_token_id is known.")
    return Tokenizer(
        backend,
        source,
        tuple(eos_ids),
        ids["bos"],
        adds_bos,
        _chat_templates(fields),
        {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None},
    )


def _read_byte_bpe(
    keys: Mapping[str, Any], vocabulary: Vocabulary, pre: PreSplit, source: str
) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` with a GGUF file's vocabulary."""
    merges = keys.get("merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise CheckpointError(f"{source}: tokenizer.ggml.merges must be lists of texts.")
    if _flag(keys, "add_space_prefix", False, source):
        raise CheckpointError(
            f"{source}: add_space_prefix=True is not supported for a byte-level tokenizer."
        )

    def build() -> Any:
        tokenizers = import_extra("tokenizers")
        cut = tokenizers.pre_tokenizers
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        bpe = tokenizers.models.BPE(
            vocab=vocabulary.ids, merges=pairs, ignore_merges=pre.whole_words
        )
        backend = tokenizers.Tokenizer(bpe)
        splits = [cut.Split(tokenizers.Regex(x), behavior="isolated") for x in pre.expressions]
        as_bytes = cut.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = cut.Sequence([*splits, as_bytes])
        backend.decoder = tokenizers.decoders.ByteLevel()
        if pre.composed:
            backend.normalizer = tokenizers.normalizers.NFC()
        return backend

    return call_tokenizers(source, build)


def _read_sentencepiece(
    keys: Mapping[str, Any], vocabulary: Vocabulary, unknown: int | None, source: str
) -> Any:
    """A SentencePiece `tokenizers.Tokenizer` with a GGUF file's vocabulary."""
    scores, count = keys.get("scores"), len(vocabulary.tokens)
    numbers = isinstance(scores, list) and all(
        type(score) in (int, float) and math.isfinite(score) for score in scores
    )
    if not isinstance(scores, list) or not numbers or len(scores) < count:
        raise CheckpointError(
            f"{source}: tokenizer.ggml.scores must be {count} numbers, one for each token."
        )
    if _flag(keys, "remove_extra_whitespaces", False, source):
        raise CheckpointError(f"{source}: remove_extra_whitespaces=True is not supported.")
    if unknown is None:
        raise CheckpointError(f"{source}: has no unknown_token_id inside its vocabulary.")
    if (longest := max(map(len, vocabulary.tokens))) > MOST_CHARACTERS:
        raise CheckpointError(
            f"{source}: a token has {longest} characters and must have at most {MOST_CHARACTERS}."
        )
    return call_tokenizers(
        source,
        lambda: sentencepiece_bpe(
            vocabulary,
            scores,
            unknown=vocabulary.tokens[unknown],
            space_prefix=bool(_flag(keys, "add_space_prefix", True, source)),
        ),
    )


def _add_tokens(backend: Any, vocabulary: Vocabulary, eos_ids: set[int]) -> None:
    """Marks the tokens that are recognised in a text; decoding hides those of control."""
    make = import_extra("tokenizers").AddedToken
    for i, kind in enumerate(vocabulary.types):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            control = kind != USER_DEFINED or i in eos_ids
            token = make(vocabulary.tokens[i], special=control, normalized=False)
            backend.add_tokens([token])


def _chat_templates(fields: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: "tokenizer.chat_template" is the default one."""
    start = "tokenizer.chat_template"
    named = {
        k.removeprefix(start).lstrip(".") or "default": v
        for k, v in fields.items()
        if k == start or k.startswith(start + ".")
    }
    return {name: text for name, text in named.items() if isinstance(text, str)}


def _flag(keys: Mapping[str, Any], key: str, default: bool | None, source: str) -> bool | None:
    """A switch of the metadata; `default` if it is missing."""
    value = keys.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: tokenizer.ggml.{key}={value!r} must be true or false.")
    return value
