"""Streaming equals decoding, and chats are rendered by the checkpoint's template."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import CheckpointError
from models.text.gguf_tokenizer import read_gguf_tokenizer
from models.text.hf_tokenizer import read_hf_tokenizer
from tests.models.text.tiny_tokenizers import (
    byte_fields,
    byte_tokenizer,
    gemma_like_backend,
    gpt_oss_like_backend,
    hf_folder,
    llama2_like_backend,
    metaspace_backend,
)


def test_stream_never_shows_part_of_a_character():
    tokenizer = byte_tokenizer()
    stream = tokenizer.stream()
    assert [stream.push([i]) for i in tokenizer.encode("é🙂")] == ["", "é", "", "", "", "🙂"]
    assert stream.push(tokenizer.encode("東")[:2]) == ""
    assert stream.flush() == "\ufffd"


BACKENDS = {
    "bytes": lambda: byte_tokenizer().backend,
    "gpt-oss": gpt_oss_like_backend,
    "llama2": llama2_like_backend,
    "gemma": gemma_like_backend,
    "metaspace": metaspace_backend,
}


@pytest.fixture(scope="module", params=BACKENDS)
def any_tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return read_hf_tokenizer(hf_folder(path, BACKENDS[request.param]()))


@settings(max_examples=300)
@given(data=st.data(), skip_special=st.booleans())
def test_stream_equals_decode_for_any_ids(any_tokenizer, data, skip_special):
    words = ["a", " b", "  ", "é", " 🙂", "👩‍🚀", "東", "<s>", "<bos>", "\n\n", "<|end|>", "\ufffd"]
    some_id = st.integers(0, any_tokenizer.vocab_size + 1).map(lambda i: [i])  # two past the end
    some_text = st.sampled_from(words).map(lambda text: any_tokenizer.encode(text))
    part_of_text = some_text.map(lambda ids: ids[1:])
    chunks = data.draw(st.lists(some_id | some_text | part_of_text, max_size=30))
    stream = any_tokenizer.stream(skip_special=skip_special)
    streamed = "".join([stream.push(chunk) for chunk in chunks]) + stream.flush()
    ids = sum(chunks, [])
    assert streamed == any_tokenizer.decode(ids, skip_special=skip_special)


def test_stream_decodes_only_recent_ids():
    tokenizer = byte_tokenizer()
    stream = tokenizer.stream()
    for _ in range(1000):
        stream.push(tokenizer.encode("ab "))
    assert len(stream._context) + len(stream._held) < 10


def test_chat_variables_reach_the_checkpoints_template():
    fields = byte_fields() | {
        "tokenizer.chat_template": "{{ bos_token }}{{ effort }}{{ messages }}"
    }
    tokenizer = read_gguf_tokenizer(fields, source="m.gguf")
    assert tokenizer.apply_chat([], effort="low") == "<s>low[]"
    with pytest.raises(CheckpointError, match="m.gguf: chat template: does not read effect"):
        tokenizer.apply_chat([], effect="low")


def test_a_chat_needs_a_template():
    with pytest.raises(CheckpointError, match="GGUF: has no chat template"):
        byte_tokenizer().apply_chat([])
