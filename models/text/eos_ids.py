"""Which tokens end a generation, from every file and vocabulary that says so."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import CheckpointError

# Tokens that end a turn or a text in published vocabularies. A GGUF file names one or two by id and
# has the others in its vocabulary alone; llama.cpp stops at all of them, too.
ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "<end_of_utterance>",
)


def all_eos_ids(source: str, *settings: Mapping[str, Any]) -> list[int]:
    """The union of the ids that configs give, those of their "text_config" included.

    Args:
      source: the checkpoint, named in errors.
      settings: contents of config.json, generation_config.json, ...

    Raises:
      CheckpointError: an `eos_token_id` is neither a token id, nor a list of them, nor null.
    """
    found: list[int] = []
    for one in settings:
        text = one.get("text_config")
        for part in (text, one) if isinstance(text, Mapping) else (one,):
            eos = part.get("eos_token_id")
            ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
            if not all(type(token) is int and token >= 0 for token in ids):
                raise CheckpointError(f"{source}: eos_token_id must be token ids, not {eos!r}.")
            found += ids
    return list(dict.fromkeys(found))


def ends_in_vocabulary(tokens: Sequence[str], control: Sequence[bool]) -> list[int]:
    """Ids of the control tokens that end a turn or a text."""
    ends = set(ENDS)
    if {"<|return|>", "<|call|>"} <= set(tokens):
        ends.discard("<|end|>")  # gpt-oss ends each of an answer's messages with it
    return [
        number
        for number, (token, special) in enumerate(zip(tokens, control, strict=True))
        if special and token in ends
    ]
