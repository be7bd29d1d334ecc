"""Text to token ids and back, with chat templates, on the `tokenizers` library.

It reads a Hugging Face folder's tokenizer.json or a GGUF file's byte BPE; SentencePiece models
without a tokenizer.json are not supported.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.chat_template import render_chat
from models.checkpoints.errors import (
    CheckpointError,
    import_extra,
    one_line,
    read_json_object,
    read_text,
)
from models.checkpoints.gguf_file import gguf_eos_ids

# How GGUF's tokenizer.ggml.pre cuts text before the merges (as the models' tokenizer.json does).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_SPLITS = {  # None: the byte level's own regex, which is GPT-2's
    "default": None,
    "gpt-2": None,
    "smollm": None,  # after single digits
    "llama-bpe": _WORDS.replace("DIGITS", r"\p{N}{1,3}"),
    "qwen2": _WORDS.replace("DIGITS", r"\p{N}"),
}
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with what a generation needs to know of it."""

    backend: Any = dataclasses.field(repr=False)  # tokenizers.Tokenizer
    source: str  # a file or folder, for errors
    eos_ids: tuple[int, ...]  # any of them ends a generation
    bos_id: int | None
    adds_bos: bool  # encode puts bos_id first
    chat_template: str | None = dataclasses.field(repr=False)
    special_tokens: Mapping[str, str]  # "bos_token", "eos_token", ... for the chat template

    @property
    def vocab_size(self) -> int:
        """Ids are below this number, added tokens included; a model's table may be padded."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens in it are recognised ("<|im_start|>").

        A BOS comes first if the checkpoint says so and `text` does not start with it already, as
        a chat template's does. No EOS is added.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids past the vocabulary nothing."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> "TextStream":
        """An incremental `decode`, for printing a generation as it comes."""
        return TextStream(self, skip_special)

    def apply_chat(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """A conversation as the prompt of the assistant's next turn.

        Args:
          messages: dicts with "role", "content" and what else the template reads.
          **variables: of the template: `tools=[...]`, gpt-oss's `reasoning_effort="low"`, Qwen3's
            `enable_thinking=False`, `add_generation_prompt=False`.

        Raises:
          CheckpointError: there is no chat template, it is broken, refuses these messages, or
            does not read one of `variables`.
        """
        if self.chat_template is None:
            raise CheckpointError(f"{self.source}: has no chat template; use a plain prompt.")
        return render_chat(
            self.chat_template,
            messages,
            special_tokens=self.special_tokens,
            source=self.source,
            variables=variables,
        )

    @classmethod
    def from_hf_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and, where they are, the configs and the chat template.

        Raises:
          CheckpointError: there is no tokenizer.json, a file is damaged, or they contradict.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"{folder}: has no tokenizer.json; give token ids instead.")
        read_text(file)
        backend = _checked(str(file), import_extra("tokenizers").Tokenizer.from_file, str(file))

        def read_optional(name: str) -> dict[str, Any]:
            return read_json_object(folder / name) if (folder / name).exists() else {}

        config = read_optional("tokenizer_config.json")
        named = {**read_optional("special_tokens_map.json"), **config}
        special = {k: _token_text(v) for k, v in named.items() if k.endswith("_token")}
        special = {k: v for k, v in special.items() if v is not None}
        _add_listed_tokens(backend, config.get("added_tokens_decoder"), special, str(folder))
        whole = read_optional("config.json")
        text = whole.get("text_config")  # a multimodal model's
        generation = read_optional("generation_config.json")
        parts = (text if isinstance(text, dict) else {}, whole, generation)
        model = {k: v for part in parts for k, v in part.items() if v is not None}
        bos_id = backend.token_to_id(special.get("bos_token", ""))
        if bos_id is None and isinstance(model.get("bos_token_id"), int):
            bos_id = model["bos_token_id"]
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:  # then the post-processor says it
            adds_bos = backend.encode("a").ids[:1] == [bos_id]
        if adds_bos and bos_id is None:
            raise CheckpointError(f"{folder}: add_bos_token is true, but no bos_token is known.")
        eos = model.get("eos_token_id", backend.token_to_id(special.get("eos_token", "")))
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(i) is int and i >= 0 for i in eos_ids):
            raise CheckpointError(f"{folder}: eos_token_id must be token ids, not {eos!r}.")
        template = _hf_chat_template(folder, config)
        return cls(backend, str(folder), tuple(eos_ids), bos_id, bool(adds_bos), template, special)

    @classmethod
    def from_gguf_fields(cls, fields: Mapping[str, Any], *, source: str = "GGUF") -> "Tokenizer":
        """Builds a byte BPE tokenizer from GGUF metadata.

        Args:
          fields: metadata as Python values, by full key ("tokenizer.ggml.tokens").
          source: the file, for errors.

        Raises:
          CheckpointError: there is none, or one of another kind.
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
        backend = _checked(source, _byte_bpe, tokens, merges, keys.get("token_type"), pre)
        special = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token = keys.get(f"{key}_token_id")
            if isinstance(token, int) and 0 <= token < len(tokens):
                special[f"{name}_token"] = tokens[token]
        return cls(
            backend,
            source,
            tuple(gguf_eos_ids(dict(fields))),
            keys["bos_token_id"] if "bos_token" in special else None,
            bool(keys.get("add_bos_token", pre == "llama-bpe")),
            fields.get("tokenizer.chat_template"),
            special,
        )


class TextStream:
    """Decodes ids as they come: all pushes and the flush together are `decode` of all ids.

    Text is held back while its last character may be incomplete. Only the ids since the last
    output are decoded again, after the few before them as context.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        added = tokenizer.backend.get_added_tokens_decoder().items()
        self._hidden = {i for i, token in added if token.special and skip_special}
        self._context: list[int] = []  # already returned as text
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids; returns the text that is complete now, often empty."""
        to_token = self._tokenizer.backend.id_to_token
        visible = (int(i) for i in ids if int(i) not in self._hidden)
        self._held += [i for i in visible if to_token(i) is not None]
        if not self._held:
            return ""
        text = self._new_text()
        # a run of byte tokens is decoded as a whole, so its end must have been seen
        in_bytes = _BYTE_TOKEN.fullmatch(to_token(self._held[-1]))
        if not text or text.endswith("\ufffd") or in_bytes:
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """Returns what is held back; an incomplete character becomes U+FFFD."""
        text = self._new_text()
        self._context, self._held = self._context + self._held, []
        return text

    def _new_text(self) -> str:
        decode = lambda ids: self._tokenizer.decode(ids, skip_special=self._skip_special)
        return decode(self._context + self._held)[len(decode(self._context)) :]


def _byte_bpe(tokens: list[str], merges: list[str], types: list[int] | None, pre: str) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` of a GGUF vocabulary."""
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


def _add_listed_tokens(backend: Any, listed: Any, special: Mapping[str, str], source: str) -> None:
    """Adds the tokens that only tokenizer_config.json knows as such, as transformers does.

    `listed` is its "added_tokens_decoder", `{"106": {"content": "<end_of_turn>", ...}}`, whose
    flags win over tokenizer.json's; `special` are the tokens with a role ("bos_token").
    """
    make = import_extra("tokenizers").AddedToken
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")

    def read(listed: Any) -> dict[int, Any]:
        return {
            int(i): make(token["content"], **{k: bool(token[k]) for k in flags if k in token})
            for i, token in sorted((listed or {}).items(), key=lambda item: int(item[0]))
        }

    tokens = _checked(f"{source}: added_tokens_decoder", read, listed)
    backend.add_tokens(list(tokens.values()))
    for i, token in tokens.items():
        actual = backend.token_to_id(token.content)
        if actual != i:
            raise CheckpointError(
                f"{source}: added_tokens_decoder says that {token.content!r} is token {i}, "
                f"in tokenizer.json it is {actual}."
            )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    texts = sorted(set(special.values()) - added)  # plain words of the vocabulary so far
    backend.add_special_tokens([t for t in texts if backend.token_to_id(t) is not None])


def _hf_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the config's template, else the processor's chat_template.json.

    Of a named list it is the one called "default".
    """
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    template = config.get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        template = read_json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """A special token's text: configs write it plain or as {"content": ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _checked(source: str, build: Any, *args: Any) -> Any:
    """Calls `build`; `tokenizers` raises bare Exceptions for damaged input."""
    try:
        return build(*args)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source}: unusable tokenizer: {one_line(error)}.") from error
