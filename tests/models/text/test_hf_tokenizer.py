"""Tokenizers from Hugging Face folders: which file decides what, and files that contradict."""

import pytest
import tokenizers

from models.errors import CheckpointError
from models.text.hf_tokenizer import read_hf_tokenizer
from tests.models.text.tiny_tokenizers import (
    WORDS,
    byte_tokenizer,
    gemma_like_backend,
    gpt_oss_like_backend,
    hf_folder,
    llama2_like_backend,
    metaspace_backend,
)


def test_hf_folder_reads_special_tokens_and_templates(tmp_path):
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "<|im_end|>",
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
        ],
    }
    source = byte_tokenizer()
    hf_folder(tmp_path, source.backend, tokenizer_config=config)
    tokenizer = read_hf_tokenizer(tmp_path)
    assert tokenizer.eos_ids == source.eos_ids and tokenizer.bos_id == source.bos_id
    assert not tokenizer.adds_bos
    assert tokenizer.apply_chat([{"role": "user", "content": "ab"}]) == "<s>ab"


def test_hf_chat_template_is_the_file_then_the_configs_then_the_processors(tmp_path):
    chat = lambda: read_hf_tokenizer(tmp_path).apply_chat([])
    hf_folder(tmp_path, byte_tokenizer().backend, chat_template={"chat_template": "processor"})
    assert chat() == "processor"
    hf_folder(tmp_path, byte_tokenizer().backend, tokenizer_config={"chat_template": "config"})
    assert chat() == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat() == "file"


@pytest.mark.parametrize(
    ("files", "eos_ids"),
    [
        ({"config": {"eos_token_id": 5}}, (5,)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [6, 7]}}, (5, 6, 7)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": None}}, (5,)),
        ({}, ()),
    ],
)
def test_hf_eos_ids_are_those_of_all_files(tmp_path, files, eos_ids):
    hf_folder(tmp_path, byte_tokenizer().backend, **files)
    assert read_hf_tokenizer(tmp_path).eos_ids == eos_ids


def test_hf_eos_ids_of_a_multimodal_config_are_its_text_models(tmp_path):
    nested = {"text_config": {"eos_token_id": [1, 5]}}
    folder = hf_folder(tmp_path, gemma_like_backend(), config=nested)
    assert read_hf_tokenizer(folder).eos_ids == (1, 5)
    hf_folder(tmp_path, gemma_like_backend(), config=nested | {"eos_token_id": 3})
    assert read_hf_tokenizer(folder).eos_ids == (1, 5, 3)


@pytest.mark.parametrize("eos", ["</s>", [1, "</s>"], [-1], True, 1.5, {}])
def test_hf_eos_ids_that_are_no_ids_are_refused(tmp_path, eos):
    hf_folder(tmp_path, byte_tokenizer().backend, generation_config={"eos_token_id": eos})
    with pytest.raises(CheckpointError, match="eos_token_id must be token ids"):
        read_hf_tokenizer(tmp_path)


@pytest.mark.parametrize("explicit", [None, False])
def test_hf_bos_follows_post_processor_unless_config_denies(tmp_path, explicit):
    source = byte_tokenizer()
    source.backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", source.bos_id)]
    )
    config = {"bos_token": "<s>"} | ({} if explicit is None else {"add_bos_token": explicit})
    tokenizer = read_hf_tokenizer(hf_folder(tmp_path, source.backend, tokenizer_config=config))
    assert tokenizer.adds_bos is (explicit is None)
    assert tokenizer.encode("ab").count(source.bos_id) == (explicit is None)
    assert tokenizer.encode("<s>ab").count(source.bos_id) == 1


def test_hf_bos_that_is_unknown_is_refused(tmp_path):
    hf_folder(tmp_path, byte_tokenizer().backend, tokenizer_config={"add_bos_token": True})
    with pytest.raises(CheckpointError, match="no bos_token is known"):
        read_hf_tokenizer(tmp_path)


def test_gemma_text_round_trips_with_one_bos(tmp_path):
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
    tokenizer = read_hf_tokenizer(
        hf_folder(tmp_path, gemma_like_backend(), tokenizer_config=config)
    )
    for text in (" ab  b\n\n🙂東é", "ab", "  ", "\n\n\nq"):
        ids = tokenizer.encode(text)
        assert ids.count(2) == 1 and ids[0] == 2
        assert tokenizer.decode(ids) == text  # a leading space is the text's own
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(" ab  b")]
    assert pieces == ["", " ab", "  ", "b"]


def test_gpt_oss_text_is_cut_by_case_and_digits(tmp_path):
    tokenizer = read_hf_tokenizer(hf_folder(tmp_path, gpt_oss_like_backend()))
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str("HTTPServer's 12345 x  y")
    assert [p.replace("Ġ", " ") for p, _ in cut] == [
        *["HTTPServer's", " ", "123", "45", " x", " ", " y"]
    ]
    assert not tokenizer.adds_bos
    for text in (WORDS, "<|start|>user<|message|> 🐳<|end|>"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_a_role_leaves_an_added_tokens_flags_alone(tmp_path):
    backend = byte_tokenizer().backend
    backend.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True, normalized=False)])
    config = {"mask_token": "<mask>"}
    tokenizer = read_hf_tokenizer(hf_folder(tmp_path, backend, tokenizer_config=config))
    assert tokenizer.decode(tokenizer.encode("a <mask>b")) == "a<mask>b"  # the space is stripped


def test_tokens_that_only_the_config_lists_are_recognised(tmp_path):
    backend = byte_tokenizer().backend
    size = backend.get_vocab_size()
    listed = {
        str(size + 1): {"content": "<late>", "special": True},
        str(size): {"content": "<new>", "special": False},
        str(backend.token_to_id("<think>")): {"content": "<think>", "special": True},
    }
    config = {"added_tokens_decoder": listed, "eos_token": "abc"}
    tokenizer = read_hf_tokenizer(hf_folder(tmp_path, backend, tokenizer_config=config))
    ids = tokenizer.encode("a<new>b<late><think>abcabc")
    assert ids[1:2] + ids[3:4] == [size, size + 1]
    assert tokenizer.decode(ids) == "a<new>b"  # the config's flags hold; an eos_token is special


@pytest.mark.parametrize(
    ("listed", "rule"),
    [
        ({"7": {"content": "<think>"}}, "'<think>' is token 7, in tokenizer.json it is"),
        ({"9999": {"content": "<far>"}}, "'<far>' is token 9999"),
        ({"x": {"content": "<new>"}}, "unusable"),
        ({"7": "<new>"}, "unusable"),
        ([1], "unusable"),
    ],
)
def test_added_tokens_that_contradict_are_named(tmp_path, listed, rule):
    hf_folder(tmp_path, byte_tokenizer().backend, tokenizer_config={"added_tokens_decoder": listed})
    with pytest.raises(CheckpointError, match=rule):
        read_hf_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config"])
@pytest.mark.parametrize("text", ["{", "[]", "", "\xff"])
def test_damaged_hf_files_are_named(tmp_path, name, text):
    hf_folder(tmp_path, byte_tokenizer().backend)
    (tmp_path / f"{name}.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"{name}.json: "):
        read_hf_tokenizer(tmp_path)


def test_a_bos_that_the_chat_template_writes_is_the_only_one(tmp_path):
    config = {"bos_token": "<bos>", "add_bos_token": True}
    config["chat_template"] = "{{ bos_token }}<start_of_turn>{{ messages[0].content }}"
    folder = hf_folder(tmp_path, gemma_like_backend(), tokenizer_config=config)
    tokenizer = read_hf_tokenizer(folder)
    ids = tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": "ab"}]))
    assert tokenizer.decode(ids, skip_special=False) == "<bos><start_of_turn>ab"


def test_texts_are_never_cut_padded_or_changed_at_random(tmp_path):
    backend = byte_tokenizer(merges=("a b",)).backend
    expected = byte_tokenizer(merges=("a b",)).encode("ab" * 100)
    backend.enable_truncation(16)
    backend.enable_padding(length=512)
    backend.model.dropout = 0.5
    tokenizer = read_hf_tokenizer(hf_folder(tmp_path, backend))
    assert tokenizer.encode("ab" * 100) == expected and len(expected) == 100


def test_a_post_processors_token_is_the_bos_where_no_config_names_one(tmp_path):
    source = byte_tokenizer()
    pair = [("<s>", source.bos_id), ("<|im_end|>", source.eos_ids[0])]
    template = tokenizers.processors.TemplateProcessing
    source.backend.post_processor = template(single="<s> $A <|im_end|>", special_tokens=pair)
    tokenizer = read_hf_tokenizer(hf_folder(tmp_path, source.backend))
    assert tokenizer.encode("ab") == [source.bos_id, *source.encode("ab")]  # and no eos
    source.backend.post_processor = template(single="<s> <|im_end|> $A", special_tokens=pair)
    with pytest.raises(CheckpointError, match="puts 2 tokens before a text"):
        read_hf_tokenizer(hf_folder(tmp_path, source.backend))


def test_flags_and_lists_of_special_tokens_hold(tmp_path):
    merges = ("a b", "ab c", "c c", "b b")
    config = {
        "mask_token": {"content": "abc", "lstrip": True},
        "additional_special_tokens": ["cc", {"content": "bb", "rstrip": True}],
        "split_special_tokens": False,
    }
    source = byte_tokenizer(merges=merges).backend
    tokenizer = read_hf_tokenizer(hf_folder(tmp_path, source, tokenizer_config=config))
    visible = tokenizer.decode(tokenizer.encode("a abca cc bb a"))
    assert visible == "aa  a"  # the spaces before abc and after bb are theirs
    config = {"eos_token": "<|im_end|>", "split_special_tokens": True}
    tokenizer = read_hf_tokenizer(hf_folder(tmp_path, source, tokenizer_config=config))
    assert len(tokenizer.encode("<|im_end|>")) == 10  # text from users can't end a turn


def test_old_folders_list_added_tokens_by_text(tmp_path):
    backend = byte_tokenizer().backend
    size = backend.get_vocab_size()
    known = {"<think>": backend.token_to_id("<think>")}
    folder = hf_folder(tmp_path, backend, added_tokens={"<new>": size} | known)
    assert read_hf_tokenizer(folder).encode("<new>") == [size]
    hf_folder(tmp_path, backend, added_tokens={"<new>": size + 5})
    with pytest.raises(CheckpointError, match="'<new>' is token"):
        read_hf_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [llama2_like_backend, metaspace_backend, byte_tokenizer])
def test_prefix_space_of_the_config_wins(tmp_path, make):
    backend = make() if make is not byte_tokenizer else make().backend
    read = lambda **config: read_hf_tokenizer(hf_folder(tmp_path, backend, tokenizer_config=config))
    with_space, without = read(add_prefix_space=True), read(add_prefix_space=False)
    assert with_space.encode("a") == without.encode(" a") != without.encode("a")
    default = read().encode("a")
    assert default == (without if make is byte_tokenizer else with_space).encode("a")
    with pytest.raises(CheckpointError, match="add_prefix_space='yes' must be true or false"):
        read(add_prefix_space="yes")
