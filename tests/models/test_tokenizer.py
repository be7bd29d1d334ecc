"""The tokenizer on tiny vocabularies made here, and on the real SmolLM2."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoints import CheckpointError, open_checkpoint
from models.smollm2 import fetch_smollm2
from models.tokenizer import Tokenizer

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "smollm2.json").read_text("utf-8"))
CASES = {case["name"]: case for case in ORACLE["cases"]}


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = fetch_smollm2()
    except CheckpointError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
    return open_checkpoint(path).load_tokenizer()


def byte_fields(pre="gpt-2", merges=("a b", "ab c"), **more):
    """GGUF metadata of a vocabulary of all bytes, some merges and three special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(m.replace(" ", "") for m in merges)]
    types = [1] * len(tokens) + [3, 3, 4]
    tokens += ["<s>", "<|im_end|>", "<think>"]
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types}
    keys |= {"merges": list(merges), "bos_token_id": len(tokens) - 3}
    keys |= {"eos_token_id": len(tokens) - 2, "eot_token_id": len(tokens) - 2} | more
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}


def make(pre="gpt-2", merges=("a b", "ab c"), **more):
    return Tokenizer.from_gguf_fields(byte_fields(pre, merges, **more))


def pieces(tokenizer, text):
    return [tokenizer.decode([i], skip_special=False) for i in tokenizer.encode(text)]


def llama2_like_backend():
    """SentencePiece's shape: metaspace, byte fallback, a leading space that decoding strips."""
    words = ["<unk>", "<s>", "▁", "▁a", "▁b", "c", "é"]
    vocab = {w: i for i, w in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    bpe = tokenizers.models.BPE(
        vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True
    )
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>"])
    return backend


WORDS = "Über den blauen Bergen, 12345 weiße Wale! naïve café 東京は夜 🙂🐳 I'm here\n\n  x  "


def gemma_like_backend():
    """Gemma's shape: spaces are the text's own, byte fallback, line breaks added, a BOS first."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    words = ["a", "b", "é", "▁", "東", "▁▁", "ab", "▁ab"]
    tokens = [*specials, "\n\n", *(f"<0x{b:02X}>" for b in range(256)), *words]
    bpe = tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("▁", "▁"), ("a", "b"), ("▁", "ab")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(specials)
    backend.add_tokens([tokenizers.AddedToken("\n\n", normalized=False)])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return backend


def gpt_oss_like_backend():
    """gpt-oss's shape: byte level after a split by case, digits in threes, harmony's tokens."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    contraction = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    words = [f"{upper}*{lower}+{contraction}", f"{upper}+{lower}*{contraction}"]
    cuts = [rf"[^\r\n\p{{L}}\p{{N}}]?{word}" for word in words]
    cuts += [r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
    cut = tokenizers.pre_tokenizers
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = cut.Sequence(
        [
            cut.Split(tokenizers.Regex("|".join(cuts)), "isolated"),
            cut.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(cut.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([WORDS, "assistant analysis final commentary"] * 3, trainer)
    marks = ("startoftext", "endoftext", "return", "constrain", "channel", "start", "end")
    backend.add_special_tokens([f"<|{mark}|>" for mark in (*marks, "message", "call")])
    return backend


def metaspace_backend():
    """A space is put before the text and taken away again: decoding strips the first one."""
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "▁", "▁a", "a", "b", "é", "\ufffd"])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("▁", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    return backend


def hf_folder(path, backend, **files):
    backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


# --- the real model


@pytest.mark.parametrize("name", CASES)
def test_oracle_prompts_round_trip(smollm2, name):
    ids = CASES[name]["input_ids"]
    assert smollm2.encode(smollm2.decode(ids, skip_special=False)) == ids


@pytest.mark.parametrize("name", CASES)
def test_oracle_text_is_decoded_whole_and_streamed(smollm2, name):
    case = CASES[name]
    assert smollm2.decode(case["greedy"], skip_special=False) == case["text"]
    stream = smollm2.stream(skip_special=False)
    assert "".join(stream.push([i]) for i in case["greedy"]) + stream.flush() == case["text"]


def test_smollm2_has_its_published_settings(smollm2):
    assert smollm2.eos_ids == (ORACLE["eos"],)
    assert (smollm2.bos_id, smollm2.adds_bos, smollm2.vocab_size) == (1, False, 49152)


def test_smollm2_chat_is_the_oracle_prompt(smollm2):
    expected = CASES["chat_sky"]["input_ids"]
    question = smollm2.decode(expected, skip_special=False)
    question = question.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    prompt = smollm2.apply_chat([{"role": "user", "content": question}])
    assert smollm2.encode(prompt) == expected


# --- GGUF vocabularies


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", [" 1234", "  ", " x", "'ll"]),
        ("default", [" 1234", "  ", " x", "'ll"]),
        ("smollm", [" ", "1", "2", "3", "4", "  ", " x", "'ll"]),
        ("qwen2", [" ", "1", "2", "3", "4", "  ", " x", "'ll"]),
        ("llama-bpe", [" ", "123", "4", "  ", " x", "'ll"]),
    ],
)
def test_pre_tokenizers_cut_where_the_models_do(pre, expected):
    cut = make(pre).backend.pre_tokenizer.pre_tokenize_str(" 1234   x'll")
    assert [piece.replace("Ġ", " ") for piece, _ in cut] == expected


def test_merges_are_applied_in_order():
    assert pieces(make(), "abcab") == ["abc", "ab"]


def test_llama_bpe_takes_whole_words_before_merges():
    merges = ("b c", "a b", "ab c")  # merging alone never reaches "abc"
    assert pieces(make("gpt-2", merges), "abc") == ["a", "bc"]
    assert pieces(make("llama-bpe", merges, add_bos_token=False), "abc") == ["abc"]


def test_special_tokens_in_text_are_recognised():
    tokenizer = make()
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
    tokenizer = make(pre, add_bos_token=add)
    assert (tokenizer.encode("ab")[0] == tokenizer.bos_id) is adds
    assert tokenizer.encode("<s>ab").count(tokenizer.bos_id) == 1  # never twice


def test_eos_ids_are_listed_once():
    assert make(eom_token_id=3).eos_ids == (make().backend.token_to_id("<|im_end|>"), 3)


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
        Tokenizer.from_gguf_fields(fields, source="m.gguf")
    assert str(caught.value).startswith("m.gguf: ")


# --- streaming


def test_stream_never_shows_part_of_a_character():
    tokenizer = make()
    stream = tokenizer.stream()
    assert [stream.push([i]) for i in tokenizer.encode("é🙂")] == ["", "é", "", "", "", "🙂"]
    assert stream.push(tokenizer.encode("東")[:2]) == ""
    assert stream.flush() == "\ufffd"


BACKENDS = {
    "bytes": lambda: make().backend,
    "gpt-oss": gpt_oss_like_backend,
    "llama2": llama2_like_backend,
    "gemma": gemma_like_backend,
    "metaspace": metaspace_backend,
}


@pytest.fixture(scope="module", params=BACKENDS)
def any_tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return Tokenizer.from_hf_folder(hf_folder(path, BACKENDS[request.param]()))


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
    tokenizer = make()
    stream = tokenizer.stream()
    for _ in range(1000):
        stream.push(tokenizer.encode("ab "))
    assert len(stream._context) + len(stream._held) < 10


# --- Hugging Face folders


def test_hf_folder_reads_special_tokens_and_templates(tmp_path):
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "<|im_end|>",
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
        ],
    }
    source = make()
    hf_folder(tmp_path, source.backend, tokenizer_config=config)
    tokenizer = Tokenizer.from_hf_folder(tmp_path)
    assert tokenizer.eos_ids == source.eos_ids and tokenizer.bos_id == source.bos_id
    assert not tokenizer.adds_bos
    assert tokenizer.apply_chat([{"role": "user", "content": "ab"}]) == "<s>ab"


def test_hf_chat_template_is_the_file_then_the_configs_then_the_processors(tmp_path):
    chat = lambda: Tokenizer.from_hf_folder(tmp_path).apply_chat([])
    hf_folder(tmp_path, make().backend, chat_template={"chat_template": "processor"})
    assert chat() == "processor"
    hf_folder(tmp_path, make().backend, tokenizer_config={"chat_template": "config"})
    assert chat() == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat() == "file"


@pytest.mark.parametrize(
    ("files", "eos_ids"),
    [
        ({"config": {"eos_token_id": 5}}, (5,)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [6, 7]}}, (6, 7)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": None}}, (5,)),
        ({}, ()),
    ],
)
def test_hf_eos_ids_come_from_generation_config_first(tmp_path, files, eos_ids):
    hf_folder(tmp_path, make().backend, **files)
    assert Tokenizer.from_hf_folder(tmp_path).eos_ids == eos_ids


def test_hf_eos_ids_of_a_multimodal_config_are_its_text_models(tmp_path):
    nested = {"text_config": {"eos_token_id": [1, 5]}}
    folder = hf_folder(tmp_path, gemma_like_backend(), config=nested)
    assert Tokenizer.from_hf_folder(folder).eos_ids == (1, 5)
    hf_folder(tmp_path, gemma_like_backend(), config=nested | {"eos_token_id": 1})
    assert Tokenizer.from_hf_folder(folder).eos_ids == (1,)


@pytest.mark.parametrize("eos", ["</s>", [1, "</s>"], [-1], True, 1.5, {}])
def test_hf_eos_ids_that_are_no_ids_are_refused(tmp_path, eos):
    hf_folder(tmp_path, make().backend, generation_config={"eos_token_id": eos})
    with pytest.raises(CheckpointError, match="eos_token_id must be token ids"):
        Tokenizer.from_hf_folder(tmp_path)


@pytest.mark.parametrize("explicit", [None, False])
def test_hf_bos_follows_post_processor_unless_config_denies(tmp_path, explicit):
    source = make()
    source.backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", source.bos_id)]
    )
    config = {"bos_token": "<s>"} | ({} if explicit is None else {"add_bos_token": explicit})
    tokenizer = Tokenizer.from_hf_folder(
        hf_folder(tmp_path, source.backend, tokenizer_config=config)
    )
    assert tokenizer.adds_bos is (explicit is None)
    assert tokenizer.encode("ab").count(source.bos_id) == (explicit is None)
    assert tokenizer.encode("<s>ab").count(source.bos_id) == 1


def test_hf_bos_that_is_unknown_is_refused(tmp_path):
    hf_folder(tmp_path, make().backend, tokenizer_config={"add_bos_token": True})
    with pytest.raises(CheckpointError, match="no bos_token is known"):
        Tokenizer.from_hf_folder(tmp_path)


def test_gemma_text_round_trips_with_one_bos(tmp_path):
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
    tokenizer = Tokenizer.from_hf_folder(
        hf_folder(tmp_path, gemma_like_backend(), tokenizer_config=config)
    )
    for text in (" ab  b\n\n🙂東é", "ab", "  ", "\n\n\nq"):
        ids = tokenizer.encode(text)
        assert ids.count(2) == 1 and ids[0] == 2
        assert tokenizer.decode(ids) == text  # a leading space is the text's own
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(" ab  b")]
    assert pieces == ["", " ab", "  ", "b"]


def test_gpt_oss_text_is_cut_by_case_and_digits(tmp_path):
    tokenizer = Tokenizer.from_hf_folder(hf_folder(tmp_path, gpt_oss_like_backend()))
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str("HTTPServer's 12345 x  y")
    assert [p.replace("Ġ", " ") for p, _ in cut] == [
        *["HTTPServer's", " ", "123", "45", " x", " ", " y"]
    ]
    assert not tokenizer.adds_bos
    for text in (WORDS, "<|start|>user<|message|> 🐳<|end|>"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_a_role_leaves_an_added_tokens_flags_alone(tmp_path):
    backend = make().backend
    backend.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True, normalized=False)])
    config = {"mask_token": "<mask>"}
    tokenizer = Tokenizer.from_hf_folder(hf_folder(tmp_path, backend, tokenizer_config=config))
    assert tokenizer.decode(tokenizer.encode("a <mask>b")) == "a<mask>b"  # the space is stripped


def test_tokens_that_only_the_config_lists_are_recognised(tmp_path):
    backend = make().backend
    size = backend.get_vocab_size()
    listed = {
        str(size + 1): {"content": "<late>", "special": True},
        str(size): {"content": "<new>", "special": False},
        str(backend.token_to_id("<think>")): {"content": "<think>", "special": True},
    }
    config = {"added_tokens_decoder": listed, "eos_token": "abc"}
    tokenizer = Tokenizer.from_hf_folder(hf_folder(tmp_path, backend, tokenizer_config=config))
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
    hf_folder(tmp_path, make().backend, tokenizer_config={"added_tokens_decoder": listed})
    with pytest.raises(CheckpointError, match=rule):
        Tokenizer.from_hf_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config"])
@pytest.mark.parametrize("text", ["{", "[]", "", "\xff"])
def test_damaged_hf_files_are_named(tmp_path, name, text):
    hf_folder(tmp_path, make().backend)
    (tmp_path / f"{name}.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"{name}.json: "):
        Tokenizer.from_hf_folder(tmp_path)


# --- chats


def test_chat_variables_reach_the_checkpoints_template():
    fields = byte_fields() | {
        "tokenizer.chat_template": "{{ bos_token }}{{ effort }}{{ messages }}"
    }
    tokenizer = Tokenizer.from_gguf_fields(fields, source="m.gguf")
    assert tokenizer.apply_chat([], effort="low") == "<s>low[]"
    with pytest.raises(CheckpointError, match="m.gguf: chat template: does not read effect"):
        tokenizer.apply_chat([], effect="low")


def test_a_chat_needs_a_template():
    with pytest.raises(CheckpointError, match="GGUF: has no chat template"):
        make().apply_chat([])


def test_a_bos_that_the_chat_template_writes_is_the_only_one(tmp_path):
    config = {"bos_token": "<bos>", "add_bos_token": True}
    config["chat_template"] = "{{ bos_token }}<start_of_turn>{{ messages[0].content }}"
    folder = hf_folder(tmp_path, gemma_like_backend(), tokenizer_config=config)
    tokenizer = Tokenizer.from_hf_folder(folder)
    ids = tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": "ab"}]))
    assert tokenizer.decode(ids, skip_special=False) == "<bos><start_of_turn>ab"
