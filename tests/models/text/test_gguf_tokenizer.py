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
        (None, [" ", "123", "4", "  ", " x", "'", "ll"]),
        ("llama3", [" ", "123", "4", "  ", " x", "'ll"]),
        ("tekken", [" ", "1", "2", "3", "4", "  ", " x", "'ll"]),
        ("gpt-4o", [" ", "123", "4", "  ", " x'll"]),
        ("starcoder", [" ", "1", "2", "3", "4", "  ", " x", "'ll"]),
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
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not supported"),
        ({"tokenizer.ggml.model": "llama"}, "tokens must be lists"),
        (byte_fields(add_space_prefix=True), "add_space_prefix=True is not supported"),
        (byte_fields(bos_token_id=None, add_bos_token=True), "no bos_token_id is known"),
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


def test_a_word_with_capitals_is_cut_by_case():
    cut = byte_tokenizer("tekken").backend.pre_tokenizer.pre_tokenize_str("getHTTPServer")
    assert [piece for piece, _ in cut] == ["get", "HTTPServer"]


@pytest.mark.parametrize(
    ("kinds", "ends"),
    [
        ({"<|eot_id|>": 3, "<|eom_id|>": 3}, ["<|eot_id|>", "<|eom_id|>"]),
        ({"<|eot_id|>": 4, "</s>": 3}, ["<|eot_id|>", "</s>"]),
        ({"<|eot_id|>": 1, "</s>": 4, "<eos>": 1}, []),  # words and markup of the vocabulary
        ({"<|return|>": 3, "<|call|>": 3, "<|end|>": 3}, ["<|return|>", "<|call|>"]),
        ({"<|end|>": 3, "<|start|>": 3}, ["<|end|>"]),
    ],
)
def test_tokens_that_end_a_turn_stop_besides_the_files_eos(kinds, ends):
    fields = byte_fields("llama-bpe")
    tokens, types = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    fields["tokenizer.ggml.tokens"] = [*tokens, *kinds]
    fields["tokenizer.ggml.token_type"] = [*types, *kinds.values()]
    tokenizer = read_gguf_tokenizer(fields)
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.eos_ids]
    assert names == ["<|im_end|>", *ends]
    assert tokenizer.decode(tokenizer.encode("".join(ends))) == ""
