"""Files that users of other libraries have reported: what each must mean."""

import json

import numpy as np
import pytest

import models
from models.checkpoints.gguf_config import read_gguf_config
from models.errors import CheckpointError
from models.families.architectures import architecture_config
from models.text.chat_template import render_chat
from models.text.gguf_tokenizer import read_gguf_tokenizer
from models.text.hf_tokenizer import read_hf_tokenizer
from tests.models.text.tiny_tokenizers import byte_fields, byte_tokenizer, hf_folder

BASE = dict(
    model_type="llama", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


def config(**keys):
    return architecture_config(BASE | keys)


@pytest.mark.parametrize("setting", ["enable_truncation", "enable_padding"])
def test_prompts_are_never_cut_or_filled_up(tmp_path, setting):
    backend = byte_tokenizer("gpt-2").backend
    getattr(backend, setting)(
        **{"enable_truncation": {"max_length": 4}}.get(setting, {"length": 9})
    )
    tokenizer = read_hf_tokenizer(hf_folder(tmp_path, backend))
    assert len(tokenizer.encode("a b a b a b")) == 11
    assert len(tokenizer.encode("a")) == 1


@pytest.mark.parametrize(
    "files, ends",
    [
        (dict(config={"eos_token_id": 5}, generation_config={"eos_token_id": [6, 5]}), [5, 6]),
        (dict(config={}, generation_config={"eos_token_id": 7}), [7]),
        (dict(config={"text_config": {"eos_token_id": 3}}, generation_config={}), [3]),
        (dict(config={"eos_token_id": 0}, generation_config={"eos_token_id": None}), [0]),
    ],
)
def test_generation_stops_at_the_ends_of_all_files(tmp_path, files, ends):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert models.open_checkpoint(tmp_path).config["eos_token_id"] == ends
    backend = byte_tokenizer().backend
    hf_folder(tmp_path, backend, tokenizer_config={"eos_token": "<|im_end|>"}, **files)
    own = backend.token_to_id("<|im_end|>")
    assert read_hf_tokenizer(tmp_path).eos_ids == (*ends, own)


def test_control_tokens_that_end_turns_end_generation():
    tokens = ["a", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"]
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.merges": [], "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1, 3, 3, 3, 1, 3], "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    assert read_gguf_tokenizer(fields).eos_ids == (2, 3, 5)  # 4 is an ordinary word here
    harmony = [*tokens, "<|return|>", "<|call|>"]
    types = {"tokenizer.ggml.tokens": harmony, "tokenizer.ggml.token_type": [3] * 8}
    assert read_gguf_tokenizer(fields | types).eos_ids == (2, 3, 4, 6, 7)  # messages go on at 5


def test_scaling_added_beside_rope_parameters_is_applied():
    plain = {"rope_type": "default", "rope_theta": 500.0}
    rope = config(rope_parameters=plain, rope_scaling={"type": "linear", "factor": 4.0}).rope
    assert rope == config(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0}).rope
    assert rope.frequencies[0] == 0.25
    gemma = BASE | {"model_type": "gemma3_text", "head_dim": 8, "rope_scaling": {"factor": 2.0}}
    both = {"full_attention": plain, "sliding_attention": plain}
    with pytest.raises(CheckpointError, match="rope_scaling beside rope_parameters of both"):
        architecture_config(gemma | {"rope_parameters": both})


def test_missing_keys_mean_the_architectures_published_defaults():
    mistral = {"model_type": "mistral", "max_position_embeddings": None}
    assert config(**mistral).windows == (4096, 4096)
    assert config(**mistral, sliding_window=None).windows == (None, None)
    bare = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "head_dim")}
    bare |= {"num_attention_heads": 32, "hidden_size": 64}
    qwen3 = architecture_config(bare | {"model_type": "qwen3"})
    assert (qwen3.kv_heads, qwen3.head_dim) == (32, 128)
    assert architecture_config(bare | {"model_type": "mistral"}).kv_heads == 8
    oss = architecture_config(bare | {"model_type": "gpt_oss"})
    assert (oss.kv_heads, oss.head_dim, oss.windows) == (8, 64, (128, None))
    assert (oss.experts.experts, oss.experts.top_k) == (128, 4)
    assert architecture_config(bare).eos_ids == (2,)
    assert architecture_config(bare | {"eos_token_id": None}).eos_ids == ()


def test_yarn_makes_the_context_longer():
    qwen3 = dict(model_type="qwen3", head_dim=8, max_position_embeddings=40_960)
    assert config(**qwen3).max_position == 40_960
    assert config(**qwen3, rope_scaling=YARN).max_position == 131_072
    longer = qwen3 | {"max_position_embeddings": 200_000}
    assert config(**longer, rope_scaling=YARN).max_position == 200_000
    linear = {"rope_type": "linear", "factor": 4.0}
    assert config(**qwen3, rope_scaling=linear).max_position == 40_960  # files give the longer one


@pytest.mark.parametrize("dtype", ["float16", np.float16])
def test_a_residual_stream_that_float16_can_not_hold_is_refused(dtype):
    from flax import nnx

    gemma = config(model_type="gemma3_text", head_dim=8, query_pre_attn_scalar=8)
    with pytest.raises(ValueError, match="dtype=float16 can't hold .*'gemma3_text'"):
        models.Decoder(gemma, nnx.Rngs(0), dtype=dtype)


class Entry:
    def __init__(self, *shape):
        self.shape = shape


def gguf(**fields):
    """The config of a tiny GGUF file with further metadata; `entries` names tensors."""
    entries = dict.fromkeys(fields.pop("entries", ()), Entry(32))
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": 32, "llama.block_count": 2,
        "llama.attention.head_count": 4, "llama.feed_forward_length": 48,
        "llama.context_length": 256, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    entries["token_embd.weight"] = Entry(40, 32)
    named = {f"llama.{key.replace('__', '.')}": value for key, value in fields.items()}
    return read_gguf_config("m.gguf", metadata | named, entries, None)


@pytest.mark.parametrize(
    "fields, factor",
    [
        (dict(rope__scaling__factor=4.0), 4.0),
        (dict(rope__scale_linear=2.0), 2.0),
        (dict(rope__scaling__type="linear", rope__scaling__factor=8.0), 8.0),
        (dict(rope__scaling__type="none", rope__scaling__factor=8.0), 1.0),
        ({}, 1.0),
    ],
)
def test_a_linear_scale_needs_no_type_in_gguf_files(fields, factor):
    rope = architecture_config(gguf(**fields)).rope
    assert rope.frequencies[0] == 1 / factor


def test_biases_on_queries_keys_and_values_alone():
    made = architecture_config(gguf(entries=["blk.0.attn_q.bias", "blk.0.attn_k.bias"]))
    assert (made.attention_bias, made.output_bias) == (True, False)
    made = architecture_config(gguf(entries=["blk.0.attn_q.bias", "blk.0.attn_output.bias"]))
    assert (made.attention_bias, made.output_bias) == (True, True)


@pytest.mark.parametrize(
    "pre, pieces, bos",
    [
        (None, ["123", "456", "7", "ab", "...", "c"], False),
        ("default", ["123", "456", "7", "ab", "...", "c"], False),
        ("gpt-2", ["1234567", "ab", "...", "c"], False),
        ("qwen2", [*"1234567", "ab", "...", "c"], False),
        ("smollm", [*"1234567", "ab", "...", "c"], False),
        ("llama-bpe", ["123", "456", "7", "ab", "...", "c"], True),
        ("llama3", ["123", "456", "7", "ab", "...", "c"], True),
    ],
)
def test_pre_tokenizers_of_gguf_files_are_llama_cpps(pre, pieces, bos):
    fields = byte_fields("gpt-2")
    del fields["tokenizer.ggml.pre"]
    fields.pop("tokenizer.ggml.add_bos_token", None)
    tokenizer = read_gguf_tokenizer(fields | ({} if pre is None else {"tokenizer.ggml.pre": pre}))
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str("1234567ab...c")
    assert [piece for piece, _ in cut] == pieces
    assert tokenizer.adds_bos is bos


def test_what_transformers_passes_to_every_template_is_taken():
    plain = "{{ messages[0].content }}"
    for variables in (
        dict(add_generation_prompt=True),
        dict(add_generation_prompt=False, tools=None, documents=None),
    ):
        said = render_chat(
            plain, [{"content": "hi"}], special_tokens={}, source="m", variables=variables
        )
        assert said == "hi"
    for variables in (dict(tools=[{}]), dict(enable_thinking=False)):
        with pytest.raises(CheckpointError, match="does not read"):
            render_chat(plain, [], special_tokens={}, source="m", variables=variables)


def test_tools_take_the_template_for_tools(tmp_path):
    named = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools | length }} tools"}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    backend = byte_tokenizer().backend
    folders = [tmp_path / "listed", tmp_path / "files"]
    for folder in folders:
        folder.mkdir()
    hf_folder(folders[0], backend, tokenizer_config={"chat_template": listed})
    hf_folder(folders[1], backend)
    (folders[1] / "additional_chat_templates").mkdir()
    (folders[1] / "chat_template.jinja").write_text(named["default"])
    (folders[1] / "additional_chat_templates" / "tool_use.jinja").write_text(named["tool_use"])
    gguf_named = {"tokenizer.chat_template": named["default"],
                  "tokenizer.chat_template.tool_use": named["tool_use"]}  # fmt: skip
    read = [read_hf_tokenizer(folder) for folder in folders]
    for tokenizer in (*read, read_gguf_tokenizer(byte_fields() | gguf_named)):
        assert tokenizer.apply_chat([{"content": "hi"}], tools=[{}, {}]) == "2 tools"
        assert tokenizer.apply_chat([{"content": "hi"}]) == "hi"
        assert tokenizer.apply_chat([{"content": "hi"}], tools=None) == "hi"
    only = {"chat_template": [listed[1]]}
    tokenizer = read_hf_tokenizer(hf_folder(folders[0], backend, tokenizer_config=only))
    with pytest.raises(CheckpointError, match="has only the chat templates tool_use"):
        tokenizer.apply_chat([{"content": "hi"}])
