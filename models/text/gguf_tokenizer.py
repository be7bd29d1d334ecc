"""Builds a `Tokenizer` from the metadata of a GGUF file. Only byte-level BPE is supported."""

from collections.abc import Mapping
from typing import Any

from models.errors import CheckpointError, import_extra
from models.text.eos_ids import ends_in_vocabulary
from models.text.tokenizer import Tokenizer, call_tokenizers

# Regular expressions that cut text into words before the merges, by the name that the metadata
# gives in tokenizer.ggml.pre. They equal those in the models' own tokenizer.json.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = [_WORDS.replace("DIGITS", r"\p{N}{1,3}")]
_QWEN2 = [_WORDS.replace("DIGITS", r"\p{N}")]
_SINGLE_DIGITS = [r"\p{N}", _GPT2]
# Each regular expression cuts the pieces that the previous ones left. Names and rules are those
# of llama.cpp, whose default, also for files without a name, cuts GPT-2's words further.
_PRE_SPLITS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "exaone4"), [_GPT2]),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _SINGLE_DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # a known word needs no merges
_NORMALIZED = ("qwen2", "deepseek-r1-qwen", "megrez")  # as the models' own tokenizer.json says
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
    kind, pre = keys.get("model"), keys.get("pre") or "default"
    tokens, merges = keys.get("tokens"), keys.get("merges")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in _PRE_SPLITS:
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
        bool(keys.get("add_bos_token", pre in _WHOLE_WORDS)),
        _chat_templates(fields),
        special,
    )


def gguf_eos_ids(fields: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end a generation: end of sequence, of turn, of message.

    The metadata names some by id; others are control tokens of the vocabulary with known names.
    """
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [fields.get(f"tokenizer.ggml.{key}") for key in keys]
    tokens, types = (fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(tokens, list):
        kinds = types if isinstance(types, list) and len(types) == len(tokens) else None
        control = [True] * len(tokens) if kinds is None else [k == _CONTROL for k in kinds]
        ids += ends_in_vocabulary(tokens, control)
    return list(dict.fromkeys(token for token in ids if isinstance(token, int)))


def _chat_templates(fields: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: "tokenizer.chat_template" is the default one."""
    start = "tokenizer.chat_template"
    named = {
        k.removeprefix(start).lstrip(".") or "default": v
        for k, v in fields.items()
        if k == start or k.startswith(start + ".")
    }
    return {name: text for name, text in named.items() if isinstance(text, str)}


def _byte_bpe(tokens: list[str], merges: list[str], types: list[int] | None, pre: str) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` with a GGUF file's vocabulary."""
    tokenizers = import_extra("tokenizers")
    cut = tokenizers.pre_tokenizers
    steps = [cut.Split(tokenizers.Regex(split), behavior="isolated") for split in _PRE_SPLITS[pre]]
    steps.append(cut.ByteLevel(add_prefix_space=False, use_regex=False))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in _WHOLE_WORDS)
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = cut.Sequence(steps)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if pre in _NORMALIZED:
        backend.normalizer = tokenizers.normalizers.NFC()
    for token, kind in zip(tokens, types or [], strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            control = kind == _CONTROL
            backend.add_tokens([tokenizers.AddedToken(token, special=control, normalized=False)])
    return backend
