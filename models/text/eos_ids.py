"""Which tokens end a generation, from every file and vocabulary that says so."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import CheckpointError
from models.numbers import MOST

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
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
)
ENDS_IF_CONTROL = ("</s>", "<eos>")  # markup in some vocabularies
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


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
            if not all(type(token) is int and 0 <= token <= MOST for token in ids):
                raise CheckpointError(f"{source}: eos_token_id must be token ids, not {eos!r}.")
            found += ids
    return list(dict.fromkeys(found))


def ends_in_vocabulary(tokens: Sequence[Any], types: Sequence[Any]) -> list[int]:
    """Ids of the tokens that end a turn or a text.

    Args:
      tokens: texts by id.
      types: llama.cpp's numbers of their types. Files type the end of a turn as `CONTROL`, some as
        `USER_DEFINED`; another type is an ordinary word. A token without one counts as `CONTROL`.
    """
    ends = set(ENDS)
    if {"<|return|>", "<|call|>"} <= {token for token in tokens if isinstance(token, str)}:
        ends.discard("<|end|>")  # gpt-oss ends each of an answer's messages with it
    found = []
    for number, token in enumerate(tokens):
        if isinstance(token, str) and (token in ends or token in ENDS_IF_CONTROL):
            kind = types[number] if number < len(types) else CONTROL
            if kind == CONTROL or (kind == USER_DEFINED and token in ends):
                found.append(number)
    return found
