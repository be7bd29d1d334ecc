"""Builds a `Tokenizer` from a Hugging Face folder: tokenizer.json and the config files beside it.

SentencePiece models without a tokenizer.json are not supported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import CheckpointError, import_extra
from models.json_files import read_json_object, read_text
from models.text.eos_ids import all_eos_ids
from models.text.tokenizer import Tokenizer, call_tokenizers


def read_hf_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json and, where they exist, the configs and the chat template.

    Raises:
      CheckpointError: there is no tokenizer.json, a file is damaged, or the files contradict each
        other.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"{folder}: has no tokenizer.json; give token ids instead.")
    read_text(file)  # explains an unreadable file better than the library does
    backend = call_tokenizers(str(file), import_extra("tokenizers").Tokenizer.from_file, str(file))
    # Settings of training batches that some files still carry: a prompt is never cut or filled up.
    backend.no_truncation()
    backend.no_padding()
    config = _read_optional(folder / "tokenizer_config.json")
    named = _read_optional(folder / "special_tokens_map.json") | config
    special = {k: _token_text(v) for k, v in named.items() if k.endswith("_token")}
    special = {k: v for k, v in special.items() if v is not None}
    _add_listed_tokens(backend, config.get("added_tokens_decoder"), special, str(folder))
    model, eos_ids = _model_settings(folder)
    bos_id = backend.token_to_id(special.get("bos_token", ""))
    if bos_id is None and isinstance(model.get("bos_token_id"), int):
        bos_id = model["bos_token_id"]
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:  # then the post-processor in tokenizer.json decides
        adds_bos = backend.encode("a").ids[:1] == [bos_id]
    if adds_bos and bos_id is None:
        raise CheckpointError(f"{folder}: add_bos_token is true, but no bos_token is known.")
    own_eos = backend.token_to_id(special.get("eos_token", ""))
    if own_eos is not None:
        eos_ids = [*eos_ids, own_eos]
    return Tokenizer(
        backend,
        str(folder),
        tuple(dict.fromkeys(eos_ids)),
        bos_id,
        bool(adds_bos),
        _chat_templates(folder, config),
        special,
    )


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.exists() else {}


def _model_settings(folder: Path) -> tuple[dict[str, Any], list[int]]:
    """config.json and generation_config.json as one dict, and the tokens that end a generation.

    The latter file wins, null counts as absent. A multimodal model's config.json has the language
    model's settings in "text_config"; settings beside it win over those inside.
    """
    whole = _read_optional(folder / "config.json")
    generation = _read_optional(folder / "generation_config.json")
    text = whole.get("text_config")
    parts = (text if isinstance(text, dict) else {}, whole, generation)
    settings = {k: v for part in parts for k, v in part.items() if v is not None}
    return settings, all_eos_ids(str(folder), whole, generation)


def _add_listed_tokens(backend: Any, listed: Any, special: Mapping[str, str], source: str) -> None:
    """Adds the tokens that only tokenizer_config.json marks as added, as transformers does.

    Args:
      backend: the `tokenizers.Tokenizer` to add them to.
      listed: the config's "added_tokens_decoder", `{"106": {"content": "<end_of_turn>", ...}}`;
        its flags win over those in tokenizer.json.
      special: texts of the tokens that have a role ("bos_token").
      source: the folder, named in errors.
    """
    make = import_extra("tokenizers").AddedToken
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")

    def read(listed: Any) -> dict[int, Any]:
        return {
            int(i): make(token["content"], **{k: bool(token[k]) for k in flags if k in token})
            for i, token in sorted((listed or {}).items(), key=lambda item: int(item[0]))
        }

    tokens = call_tokenizers(f"{source}: added_tokens_decoder", read, listed)
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
    texts = sorted(set(special.values()) - added)
    backend.add_special_tokens([t for t in texts if backend.token_to_id(t) is not None])


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name; the usual one is called "default".

    chat_template.jinja and the files in additional_chat_templates, else the config's template or
    list of templates, else the processor's chat_template.json.
    """
    if (folder / "chat_template.jinja").exists():
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        files = {"default": folder / "chat_template.jinja"} | {file.stem: file for file in more}
        return {name: read_text(file) for name, file in files.items()}
    template = config.get("chat_template")
    if template is None:
        template = _read_optional(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        pairs = [(t.get("name"), t.get("template")) for t in template if isinstance(t, dict)]
    else:
        pairs = [("default", template)]
    return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}


def _token_text(token: Any) -> str | None:
    """A special token's text; configs write it as a string or as {"content": ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
