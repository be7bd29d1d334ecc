"""Tokenizers from GGUF metadata: cuts, merges, special tokens, and the kinds that are refused."""

import pytest

from models.errors import CheckpointError
from models.text.gguf_tokenizer import read_gguf_tokenizer
from tests.models.text.tiny_tokenizers import byte_fields, byte_tokenizer, pieces


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", [" 1234", "  ", " x", "'ll"]),
        ("default", [" ", "123", "4", "  ", " x", "'", "ll"]),
        ("smollm", [" ", "1", "2", "3", "4", "  ", " x", "'ll"]),
        ("qwen2", [" ", "1", "2", "3", "4", "  ", " x", "'ll"]),
        ("llama-bpe", [" ", "123", "4", "  ", " x", "'ll"]),
    ],
)
def test_pre_tokenizers_cut_where_the_models_do(pre, expected):
    cut = byte_tokenizer(pre).backend.pre_tokenizer.pre_tokenize_str(" 1234   x'll")
    assert [piece.replace("Ġ", " ") for piece, _ in cut] == expected


def test_merges_are_applied_in_order():
    assert pieces(byte_tokenizer(), "abcab") == ["abc", "ab"]


def test_llama_bpe_takes_whole_words_before_merges():
    merges = ("b c", "a b", "ab c")  # merging alone never reaches "abc"
    assert pieces(byte_tokenizer("gpt-2", merges), "abc") == ["a", "bc"]
    assert pieces(byte_tokenizer("llama-bpe", merges, add_bos_token=False), "abc") == ["abc"]


def test_special_tokens_in_text_are_recognised():
    tokenizer = byte_tokenizer()
    assert pieces(tokenizer, "ab<|im_end|>ab<think>") == ["ab", "<|im_end|>", "ab", "<think>"]
    ids = tokenizer.encode("ab<|im_end|><think>")
    assert tokenizer.decode(ids) == "ab<think>"
    assert tokenizer.decode(ids, skip_special=False) == "ab<|im_end|><think>"


@pytest.mark.parametrize(
    ("pre", "add", "adds"),
    [("gpt-2", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False)]
    + [("gpt-2", True, True)],
)
def test_bos_is_added_only_if_the_file_says_so(pre, add, adds):
    tokenizer = byte_tokenizer(pre, add_bos_token=add)
    assert (tokenizer.encode("ab")[0] == tokenizer.bos_id) is adds
    assert tokenizer.encode("<s>ab").count(tokenizer.bos_id) == 1  # never twice


def test_eos_ids_are_listed_once():
    assert byte_tokenizer(eom_token_id=3).eos_ids == (
        byte_tokenizer().backend.token_to_id("<|im_end|>"),
        3,
    )


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama' is not supported"),
        ({}, "tokenizer None is not supported"),
        (byte_fields("deepseek-v3"), "pre-tokenizer 'deepseek-v3' is not supported"),
        ({"tokenizer.ggml.model": "gpt2"}, "must be lists"),
        (byte_fields() | {"tokenizer.ggml.merges": ["a nope"]}, "unusable tokenizer"),
    ],
)
def test_unsupported_gguf_tokenizers_say_which(fields, rule):
    with pytest.raises(CheckpointError, match=rule) as caught:
        read_gguf_tokenizer(fields, source="m.gguf")
    assert str(caught.value).startswith("m.gguf: ")
