"""SentencePiece vocabularies of GGUF files, against ids of the sentencepiece package."""

import json
from pathlib import Path

import pytest

from models.errors import CheckpointError
from models.text.gguf_tokenizer import read_gguf_tokenizer

# Two BPE models of 700 tokens that sentencepiece 0.2.1 or later trained (byte_fallback,
# split_digits, with and without add_dummy_prefix): pieces, scores, llama.cpp's numbers of their
# types, and the package's ids of texts.
STORED = Path(__file__).parents[2] / "data" / "sentencepiece_ids.json"
MODELS = json.loads(STORED.read_text(encoding="utf-8"))


def spm_fields(name="llama", **more):
    """GGUF metadata of a stored model, as llama.cpp's converter writes it."""
    stored = MODELS[name]
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": stored["tokens"],
        "scores": stored["scores"],
        "token_type": stored["types"],
        "add_space_prefix": stored["space_prefix"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    keys |= more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_sentencepieces(name):
    tokenizer = read_gguf_tokenizer(spm_fields(name))
    for text, ids in MODELS[name]["texts"].items():
        assert tokenizer.encode(text) == [1, *ids], text


@pytest.mark.parametrize("name", MODELS)
def test_texts_come_back(name):
    tokenizer = read_gguf_tokenizer(spm_fields(name))
    for text in MODELS[name]["texts"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, [[i] for i in ids]), stream.flush()]) == tokenizer.decode(
            ids
        )


def test_a_space_is_put_before_each_text_between_special_tokens():
    tokenizer = read_gguf_tokenizer(spm_fields())
    inner = tokenizer.encode("the")[1:]
    assert tokenizer.encode("<s>the</s>the") == [1, *inner, 2, *inner]
    assert tokenizer.encode("<s>the") == tokenizer.encode("the")  # no second BOS


def test_user_defined_tokens_are_taken_before_merges_and_shown():
    stored = MODELS["gemma"]
    new = ["<|im_end|>", "  ", "<start_of_turn>"]
    fields = spm_fields(
        "gemma",
        tokens=[*stored["tokens"], *new],
        scores=[*stored["scores"], -1000.0, -1000.0, -1000.0],
        token_type=[*stored["types"], 4, 4, 3],
    )
    tokenizer = read_gguf_tokenizer(fields)
    first = len(stored["tokens"])
    assert tokenizer.encode("  <|im_end|><start_of_turn>") == [1, first + 1, first, first + 2]
    assert tokenizer.eos_ids == (2, first)  # the end of a turn stops, whatever its type
    assert tokenizer.decode(tokenizer.encode("  <|im_end|>")) == "  "


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None}, (1, (2,))),
        ({"bos_token_id": 5}, (5, (2,))),
        ({"eos_token_id": 7}, (1, (7, 2))),  # </s> is a control token
    ],
)
def test_ids_that_a_file_does_not_give_are_sentencepieces(keys, ids):
    tokenizer = read_gguf_tokenizer(spm_fields(**keys))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == ids
    assert tokenizer.encode("a")[0] == ids[0]


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"scores": None}, "scores must be 700 numbers"),
        ({"scores": [0.0]}, "scores must be 700 numbers"),
        ({"scores": [float("nan")] * 700}, "scores must be 700 numbers"),
        ({"tokens": [], "scores": [], "token_type": None}, "no unknown_token_id"),
        ({"token_type": [1]}, "token_type must have an entry"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "tokens has 'a' twice"),
        ({"tokens": ["a" * 2000], "token_type": None, "scores": [0.0]}, "2000 characters"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=True is not supported"),
        ({"add_bos_token": "yes"}, "add_bos_token='yes' must be true or false"),
    ],
)
def test_what_would_change_the_ids_is_refused(keys, rule):
    with pytest.raises(CheckpointError, match=rule) as caught:
        read_gguf_tokenizer(spm_fields(**keys), source="m.gguf")
    assert str(caught.value).startswith("m.gguf: ")
