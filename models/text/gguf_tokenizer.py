"""Builds a `Tokenizer` from the metadata of a GGUF file. Only byte-level BPE is supported."""

from collections.abc import Mapping
from typing import Any

from models.errors import CheckpointError, import_extra
from models.text.tokenizer import Tokenizer, call_tokenizers

# Regular expressions that cut text into words before the merges, by the name that the metadata
# gives in tokenizer.ggml.pre. They equal those in the models' own tokenizer.json.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_SPLITS = {  # None stands for the regex built into the byte level, which is GPT-2's
    "default": None,
    "gpt-2": None,
    "smollm": None,  # applied after digits have been cut off one by one
    "llama-bpe": _WORDS.replace("DIGITS", r"\p{N}{1,3}"),
    "qwen2": _WORDS.replace("DIGITS", r"\p{N}"),
}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def read_gguf_tokenizer(fields: Mapping[str, Any], *, source: str = "GGUF") -> Tokenizer:
    """Builds a byte-level BPE tokenizer.

    Args:
      fields: metadata as Python values, by full key ("tokenizer.ggml.tokens").
      source: the file, named in errors.

    Raises:
      CheckpointError: the metadata has no tokenizer, or one of another kind.
    """
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items()}
    kind, pre = keys.get("model"), keys.get("pre", "default")
    tokens, merges = keys.get("tokens"), keys.get("merges")
    if kind != "gpt2" or pre not in _PRE_SPLITS:
        what = f"tokenizer {kind!r}" if kind != "gpt2" else f"pre-tokenizer {pre!r}"
        raise CheckpointError(
            f"{source}: {what} is not supported; give token ids or use a tokenizer.json."
        )
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise CheckpointError(f"{source}: tokenizer.ggml.tokens and .merges must be lists.")
    backend = call_tokenizers(source, _byte_bpe, tokens, merges, keys.get("token_type"), pre)
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = keys.get(f"{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            special[f"{name}_token"] = tokens[token]
    return Tokenizer(
        backend,
        source,
        tuple(gguf_eos_ids(fields)),
        keys["bos_token_id"] if "bos_token" in special else None,
        bool(keys.get("add_bos_token", pre == "llama-bpe")),
        fields.get("tokenizer.chat_template"),
        special,
    )


def gguf_eos_ids(fields: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end a generation: end of sequence, end of turn, end of message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (fields.get(f"tokenizer.ggml.{key}") for key in keys)
    return list(dict.fromkeys(token for token in ids if isinstance(token, int)))


def _byte_bpe(tokens: list[str], merges: list[str], types: list[int] | None, pre: str) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` with a GGUF file's vocabulary."""
    tokenizers = import_extra("tokenizers")
    split = _PRE_SPLITS[pre]
    cut = tokenizers.pre_tokenizers
    steps = [cut.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if pre == "smollm":
        steps.insert(0, cut.Digits(individual_digits=True))
    if split is not None:
        steps.insert(0, cut.Split(tokenizers.Regex(split), behavior="isolated"))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = cut.Sequence(steps)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    for token, kind in zip(tokens, types or [], strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            control = kind == _CONTROL
            backend.add_tokens([tokenizers.AddedToken(token, special=control, normalized=False)])
    return backend
