"""tokenizer.json files that would end the process, or take its memory, are refused beforehand."""

import base64
import json
import struct

import pytest

from models.errors import CheckpointError
from models.text.hf_tokenizer import read_hf_tokenizer
from tests.models.text.tiny_tokenizers import byte_tokenizer, gemma_like_backend, hf_folder

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
CHARSMAP = lambda size, rest: base64.b64encode(struct.pack("<I", size) + bytes(rest)).decode()
PRECOMPILED = lambda text: {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def read(folder, **keys):
    hf_folder(folder, gemma_like_backend())
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= keys.pop("model", {})
    file.write_text(json.dumps(content | keys))
    return read_hf_tokenizer(folder)


@pytest.mark.parametrize(
    "keys, part",
    [
        ({"model": {"continuing_subword_prefix": "##"}}, "must start with '##'"),  # aborts
        (PRECOMPILED(CHARSMAP(2**32 - 4, 8)), "precompiled_charsmap is damaged"),  # aborts
        (PRECOMPILED("AAAA"), "precompiled_charsmap is damaged"),  # panics
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 5}}, "times longer"),
        ({"normalizer": REPLACE | {"content": "x" * 10**6}}, "times longer"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "length of pieces"),
        ({"post_processor": TEMPLATE}, "unknown special token '<none>'"),
        ({"model": {"vocab": {"a": 2**31}}}, "a token id must be"),
        ({"model": {"vocab": {"a": -1}}}, "a token id must be"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "["}}}, "unusable tokenizer"),
    ],
    ids=range(10),
)
def test_what_would_end_the_process_is_one_line(tmp_path, keys, part):
    with pytest.raises(CheckpointError, match=part) as caught:
        read(tmp_path, **keys)
    assert str(tmp_path) in str(caught.value)


def test_training_settings_that_no_memory_holds_are_not_applied(tmp_path):
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9}
    plain = read(tmp_path)
    odd = read(tmp_path, padding=padding, truncation=truncation)
    assert odd.encode("ab b" * 9) == plain.encode("ab b" * 9)


def test_a_regular_expression_that_takes_too_many_tries_is_one_line(tmp_path, capfd):
    pattern = {"Regex": r"(?:a|a|aa)*\1(x+x+)+y|(a|aa|a.a)+$"}
    tokenizer = read(
        tmp_path,
        pre_tokenizer={
            "type": "Split",
            "pattern": pattern,
            "behavior": "Isolated",
            "invert": False,
        },
    )
    with pytest.raises(CheckpointError, match="a library gave up"):
        tokenizer.encode("x" * 4000 + "a" * 4000 + "b")


def test_merges_with_their_prefix_are_read(tmp_path):
    vocab = {"a": 0, "##b": 1, "ab": 2}
    model = {"vocab": vocab, "merges": [["a", "##b"]], "continuing_subword_prefix": "##"}
    model |= {"byte_fallback": False, "unk_token": None}
    keys = {"added_tokens": [], "post_processor": None, "normalizer": None, "pre_tokenizer": None}
    assert read(tmp_path, model=model, **keys).encode("ab") == [2]


def test_published_shapes_pass(tmp_path):
    for backend in (gemma_like_backend(), byte_tokenizer("llama-bpe").backend):
        text = "ab é 東 12345"
        tokenizer = read_hf_tokenizer(hf_folder(tmp_path, backend))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_unknown_token_outside_the_vocabulary_is_one_line(tmp_path):
    tokenizer = read(tmp_path, model={"unk_token": "<none>", "byte_fallback": False})
    with pytest.raises(CheckpointError, match="Unk token `<none>` not found in the vocabulary"):
        tokenizer.encode("z")
