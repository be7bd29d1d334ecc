"""Tiny GGUF files made here: row order, names, config, and every way they can be damaged."""

import sys

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from models.checkpoints.gguf_header import read_gguf_header
from models.checkpoints.open import open_checkpoint
from models.errors import CheckpointError

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB = 4, 2, 8, 32, 64, 24


def hf_weights(seed=0, *, qk_norm=False, tied=True):
    """One layer, by Hugging Face names."""
    rng = np.random.default_rng(seed)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        layer + "input_layernorm.weight": (HIDDEN,),
        layer + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        layer + "post_attention_layernorm.weight": (HIDDEN,),
        layer + "mlp.gate_proj.weight": (FFN, HIDDEN),
        layer + "mlp.up_proj.weight": (FFN, HIDDEN),
        layer + "mlp.down_proj.weight": (HIDDEN, FFN),
        "model.norm.weight": (HIDDEN,),
    }
    if qk_norm:
        shapes |= {layer + f"self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def gguf_name(name):
    """Hugging Face's name as llama.cpp writes it; the gguf package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 1)
    return table.get_name(name, try_suffixes=(".weight", ".bias"))


def interleave_rows(rows, heads):
    """Row i and row i + d/2 of each head become neighbours, one row at a time."""
    out = np.empty_like(rows)
    half = rows.shape[0] // heads // 2
    for head in range(heads):
        for i in range(half):
            out[2 * half * head + 2 * i] = rows[2 * half * head + i]
            out[2 * half * head + 2 * i + 1] = rows[2 * half * head + half + i]
    return out


def write_gguf(path, weights, *, arch="llama", kind="F32", extra=(), tokenizer=False):
    """Writes weights as llama.cpp's converter does; matrices as `kind`, norms as float32."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([*"abcdefghijklmnopqrstu", "ab", "<s>", "</s>"])
        writer.add_token_types([1] * 22 + [3, 3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(22)
        writer.add_eos_token_id(23)
    for method, *arguments in extra:
        getattr(writer, method)(*arguments)
    for name, values in weights.items():
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name and arch == "llama":
                values = interleave_rows(values, heads)
        raw = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = quantize(values, raw)
        known = gguf_name(name) or name
        writer.add_tensor(known, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def error_of(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_float_weights_come_back_by_hf_name_and_row_order(tmp_path, arch):
    weights = hf_weights(qk_norm=arch == "qwen3", tied=False)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, arch=arch))
    assert set(checkpoint.tensors) == set(weights)
    for name, values in weights.items():
        assert checkpoint.shape(name) == values.shape
        np.testing.assert_array_equal(checkpoint.read(name), values, err_msg=name)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_packed_weights_come_back_dequantized_in_row_order(tmp_path, kind):
    weights = hf_weights()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, kind=kind))
    raw = gguf.GGMLQuantizationType[kind]
    for name, values in weights.items():
        expected = dequantize(quantize(values, raw), raw) if values.ndim > 1 else values
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), expected)


def test_biases_are_permuted_like_their_rows(tmp_path):
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    weights = hf_weights() | {"model.layers.0.self_attn.q_proj.bias": bias}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias"), bias)
    assert checkpoint.config["attention_bias"] is True


def test_config_is_read_from_metadata(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_weights(), tokenizer=True)
    assert open_checkpoint(path).config == {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,  # and not float32's 9.99999974e-06
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "attention_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": 22,
        "eos_token_id": [23],
    }


def test_output_tensor_means_untied_embeddings(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_weights(tied=False))
    assert open_checkpoint(path).config["tie_word_embeddings"] is False


def test_key_length_overrides_head_dim(tmp_path):
    extra = [("add_key_length", 16), ("add_value_length", 16)]
    weights = {"model.embed_tokens.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", weights, arch="qwen3", extra=extra)
    assert open_checkpoint(path).config["head_dim"] == 16


def test_window_makes_a_llama_file_mistral(tmp_path):
    extra = [("add_sliding_window", 24)]
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", hf_weights(), extra=extra)).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 24)


def test_linear_rope_scaling(tmp_path):
    extra = [
        ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
        ("add_rope_scaling_factor", 4.0),
    ]
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", hf_weights(), extra=extra)).config
    expected = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
    assert config["rope_parameters"] == expected


def test_rope_factors_go_to_the_config_and_are_no_weight(tmp_path):
    factors = np.array([1, 1.5, 4, 8], np.float32)
    weights = hf_weights() | {"rope_freqs.weight": factors}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))
    rope = checkpoint.config["rope_parameters"]
    assert rope == {"rope_type": "factors", "rope_theta": 50000.0, "factors": [1, 1.5, 4, 8]}
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_unknown_tensor_keeps_its_name_for_the_loader_to_refuse(tmp_path):
    weights = hf_weights() | {"blk.0.strange.weight": np.zeros((2, 32), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", weights)
    assert "blk.0.strange.weight" in open_checkpoint(path).tensors


@pytest.mark.parametrize(
    ("extra", "rule"),
    [
        ([("add_rope_scaling_type", gguf.RopeScalingType.YARN)], "rope scaling 'yarn'"),
        ([("add_expert_count", 8)], "mixtures of experts"),
        ([("add_uint16", "split.count", 3)], "llama-gguf-split --merge"),
        ([("add_rope_dimension_count", 4)], "rotating a part of head_dim"),
        ([("add_key_length", 8), ("add_value_length", 16)], "value_length"),
        (
            [("add_string", "llama.vocab_size", "x"), ("add_rope_dimension_count", 0)],
            "must be a positive number, not 0",
        ),
    ],
)
def test_unsupported_features_are_named(tmp_path, extra, rule):
    assert rule in error_of(write_gguf(tmp_path / "m.gguf", hf_weights(), extra=extra))


def test_unknown_architecture_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_weights(), arch="mamba")
    assert "architecture 'mamba' is not supported" in error_of(path)


def test_odd_head_count_for_the_rows_is_refused(tmp_path):
    weights = hf_weights()
    weights["model.layers.0.self_attn.k_proj.weight"] = np.zeros((6, HIDDEN), np.float32)
    assert "attn_k.weight: shape (6, 32)" in error_of(write_gguf(tmp_path / "m.gguf", weights))


def test_header_agrees_with_the_gguf_package(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_weights(), kind="Q8_0", tokenizer=True)
    fields, entries = read_gguf_header(path, np.fromfile(path, np.uint8))
    reader = gguf.GGUFReader(path)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert fields == theirs
    assert [(e.name, e.ggml_type, e.offset, list(reversed(e.shape))) for e in entries] == [
        (t.name, t.tensor_type, t.data_offset, t.shape.tolist()) for t in reader.tensors
    ]


def test_every_truncation_is_one_clear_error(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_weights(), kind="Q8_0", tokenizer=True)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:size])
        message = error_of(path)
        assert size < 4 or ("truncated" in message and f"has {size}" in message)


def test_damaged_headers_raise_nothing_else(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_weights(), kind="Q8_0", tokenizer=True)
    whole = path.read_bytes()
    header = min(e.offset for e in read_gguf_header(path, np.fromfile(path, np.uint8))[1])
    rng = np.random.default_rng(0)
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[rng.integers(header)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.tensors:
                checkpoint.read(name)
            checkpoint.load_tokenizer().encode("abc")
        except CheckpointError as error:
            assert str(path) in str(error)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\3\4" + bytes(100))
    assert "not a GGUF file" in error_of(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    assert "version=1" in error_of(path)
    path.write_bytes(b"")
    assert "not a GGUF file" in error_of(path)


def test_empty_tensor_is_refused(tmp_path):  # gguf's dequantize fails on it with a numpy error
    weights = hf_weights() | {"blk.0.strange.weight": np.zeros((0, 32), np.float32)}
    assert "must not be empty" in error_of(write_gguf(tmp_path / "m.gguf", weights, kind="Q8_0"))


def test_missing_gguf_package_names_the_extra(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", hf_weights())
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes the import fail
    with pytest.raises(CheckpointError, match=r"'gguf': pip install 'jaxkv\[models\]'"):
        open_checkpoint(path)
