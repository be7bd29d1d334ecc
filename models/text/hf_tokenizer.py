"""Builds a `Tokenizer` from a Hugging Face folder: tokenizer.json and the config files beside it.

SentencePiece models without a tokenizer.json are not supported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import CheckpointError, clear_errors, import_extra
from models.json_files import read_json_object, read_text
from models.numbers import switch, token_id
from models.text.eos_ids import all_eos_ids
from models.text.hf_special_tokens import add_special_tokens, special_texts
from models.text.prefix_space import with_prefix_space
from models.text.tokenizer import Tokenizer, call_tokenizers
from models.text.tokenizer_file import check_tokenizer_json


def read_hf_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json and, where they exist, the configs and the chat templates.

    Settings of training are not applied: texts are never truncated or padded, and no merge is left
    out at random.

    Raises:
      CheckpointError: there is no tokenizer.json, a file is damaged, or the files contradict each
        other.
    """
    with clear_errors(folder):
        return _read(folder)


def _read(folder: Path) -> Tokenizer:
    file, source = folder / "tokenizer.json", str(folder)
    if not file.exists():
        raise CheckpointError(f"{folder}: has no tokenizer.json; give token ids instead.")
    text = read_text(file)
    check_tokenizer_json(text, str(file))
    backend = call_tokenizers(str(file), import_extra("tokenizers").Tokenizer.from_str, text)
    config = _read_optional(folder / "tokenizer_config.json")
    named = _read_optional(folder / "special_tokens_map.json") | config
    backend = with_prefix_space(backend, config.get("add_prefix_space"), source)
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    special = special_texts(named)
    add_special_tokens(backend, named, _read_optional(folder / "added_tokens.json"), source)
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    bos_id, adds_bos = _find_bos(backend, config, special, folder)
    settings = (_read_optional(folder / name) for name in ("config.json", "generation_config.json"))
    eos_ids = all_eos_ids(source, *settings)
    if (eos := backend.token_to_id(special.get("eos_token", ""))) is not None:
        eos_ids.append(eos)
    return Tokenizer(
        backend,
        source,
        tuple(dict.fromkeys(eos_ids)),
        bos_id,
        adds_bos,
        _chat_templates(folder, config),
        special,
    )


def _read_optional(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; empty if there is no such file."""
    return read_json_object(file) if file.exists() else {}


def _find_bos(
    backend: Any, config: Mapping[str, Any], special: Mapping[str, str], folder: Path
) -> tuple[int | None, bool]:
    """The id of the BOS, and whether `encode` puts it first.

    `add_bos_token` decides; without it the post-processor in tokenizer.json does.
    """
    bos_id = backend.token_to_id(special.get("bos_token", ""))
    for name in ("generation_config.json", "config.json"):
        given = _read_optional(folder / name).get("bos_token_id")
        if bos_id is None and given is not None:
            bos_id = token_id(f"{folder / name}: bos_token_id", given)
    explicit = config.get("add_bos_token")
    if explicit is not None:
        if switch(f"{folder}: add_bos_token", explicit) and bos_id is None:
            raise CheckpointError(f"{folder}: add_bos_token is true, but no bos_token is known.")
        return bos_id, explicit
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    before = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    if before > 1:
        raise CheckpointError(
            f"{folder}: tokenizer.json puts {before} tokens before a text; only one is supported."
        )
    return (whole[0], True) if before else (bos_id, False)


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
