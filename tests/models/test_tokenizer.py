"""The tokenizer on tiny vocabularies made here, and on the real SmolLM2."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from models.checkpoints import CheckpointError, open_checkpoint
from models.smollm2 import fetch_smollm2
from models.tokenizer import Tokenizer

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "smollm2.json").read_text("utf-8"))
CASES = {case["name"]: case for case in ORACLE["cases"]}
CHATML = (
    "{% for message in messages %}\n"
    "  {% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n"
)


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


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_stream_equals_decode_for_any_ids(tmp_path, kind, skip_special):
    sentencepiece = kind == "sentencepiece"
    folder = hf_folder(tmp_path, llama2_like_backend()) if sentencepiece else None
    tokenizer = Tokenizer.from_hf_folder(folder) if folder else make()
    rng = random.Random(0)
    for _ in range(300):
        ids = []
        for _ in range(rng.randrange(30)):
            text = rng.choice(["a", " b", "é", "🙂", "東", "<s>", "\n"])
            ids += rng.choice([tokenizer.encode(text), [rng.randrange(tokenizer.vocab_size + 2)]])
        stream, parts, rest = tokenizer.stream(skip_special=skip_special), [], list(ids)
        while rest:
            size = rng.randrange(4)
            parts.append(stream.push(rest[:size]))
            rest = rest[size:]
        parts.append(stream.flush())
        assert "".join(parts) == tokenizer.decode(ids, skip_special=skip_special), ids


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
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_hf_folder(tmp_path).apply_chat([]) == "file"


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


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config"])
@pytest.mark.parametrize("text", ["{", "[]", "", "\xff"])
def test_damaged_hf_files_are_named(tmp_path, name, text):
    hf_folder(tmp_path, make().backend)
    (tmp_path / f"{name}.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"{name}.json: "):
        Tokenizer.from_hf_folder(tmp_path)


# --- chat templates


def with_template(template):
    fields = byte_fields() | {"tokenizer.chat_template": template}
    return Tokenizer.from_gguf_fields(fields, source="m.gguf")


def test_template_blocks_are_trimmed_as_transformers_does():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert with_template(CHATML).apply_chat(messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_template_helpers_work():
    template = (
        "{{ messages | tojson }}{{ strftime_now('%Y') | length }}{{ eos_token }}"
        "{% for x in [1, 2] %}{% generation %}g{% endgeneration %}{% break %}{% endfor %}"
    )
    text = with_template(template).apply_chat([{"role": "user", "content": "<é>"}])
    assert text == '[{"role": "user", "content": "<é>"}]4<|im_end|>g'


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        (CHATML, "no tools"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append.*is unsafe"),
        ("{{ 'a' + none }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        (None, "has no chat template"),
    ],
)
def test_template_failures_are_one_line(template, rule):
    with pytest.raises(CheckpointError, match=rule) as caught:
        with_template(template).apply_chat([{"role": "tool", "content": "x"}])
    assert str(caught.value).startswith("m.gguf: ") and "\n" not in str(caught.value)
