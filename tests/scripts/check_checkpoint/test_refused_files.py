"""Files that can't be right end the command with one line that names the fault."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.scripts.check_checkpoint.oracles import ORACLES

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def remove(weights):
    del weights[Q_PROJ]


def add(weights):
    weights["model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)


def transpose(weights):
    weights[Q_PROJ] = np.ascontiguousarray(weights[Q_PROJ].T[:, :-1])


@pytest.mark.parametrize(
    "damage, parts",
    [
        (remove, ["has no tensor", Q_PROJ]),
        (add, ["model.layers.3.mlp.up_proj.weight", "no parameter"]),
        (transpose, [Q_PROJ, "(96, 95)", "(96, 96)"]),
    ],
)
def test_tensors_must_match_by_name_and_shape(error_line, copy, damage, parts):
    folder = copy("llama")
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors")
    line = error_line(folder)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("layers, odd", [(2, "model.layers.2."), (4, "model.layers.3.")])
def test_number_of_layers_must_match(error_line, copy, layers, odd):
    assert odd in error_line(copy("llama", num_hidden_layers=layers))


@pytest.mark.parametrize(
    "keys, part",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": ["llama"]}, "model_type="),
        ({"hidden_size": None}, "model.embed_tokens.weight"),  # null means the default
        ({"hidden_size": "96"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"num_attention_heads": 6.0}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"head_dim": -16}, "head_dim"),
        ({"intermediate_size": [1]}, "intermediate_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"eos_token_id": "two"}, "eos_token_id"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, "rope_type='ntk'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "['full_attention']"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_parameters": {"rope_theta": "high"}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3"}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items())[:60] if isinstance(x, dict) else "",
)
def test_config_that_can_not_be(error_line, copy, keys, part):
    line = error_line(copy("llama", **keys))
    assert part in line, line


@pytest.mark.parametrize("window", [-3, "24", 2.5])
def test_window_that_can_not_be(error_line, copy, window):
    assert "sliding_window" in error_line(copy("mistral_swa", sliding_window=window))


@pytest.mark.parametrize(
    "types, part",
    [(["full_attention"] * 2, "2 entries"), (["full_attention", "chunked", "x"], "chunked")],
)
def test_layer_types_that_can_not_be(error_line, copy, types, part):
    keys = {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}
    assert part in error_line(copy("qwen3", **keys))


@pytest.mark.parametrize("text", ["{", "[]", "", "\x00", '{"model_type": "llama"'])
def test_config_that_is_no_json_object(error_line, copy, text):
    folder = copy("llama")
    (folder / "config.json").write_text(text)
    assert "config.json" in error_line(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, 100_000, -1])
def test_truncated_weights(error_line, copy, keep):
    path = copy("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    line = error_line(path.parent)
    assert "model.safetensors" in line and "truncated" in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "io.npz"])
def test_missing_file(error_line, copy, name):
    folder = copy("llama")
    (folder / name).unlink()
    assert name in error_line(folder)


@pytest.mark.parametrize("keep", [0, 100, 10_000, -30])
def test_damaged_oracle_file(error_line, copy, keep):
    path = copy("llama") / "io.npz"
    path.write_bytes(path.read_bytes()[:keep])
    assert "io.npz" in error_line(path.parent)


@pytest.mark.parametrize(
    "change",
    [
        lambda ids, logits: {"input_ids": ids},
        lambda ids, logits: {"input_ids": ids, "logits": logits[:, :-1]},
        lambda ids, logits: {"input_ids": ids, "logits": logits[..., :1]},  # must not broadcast
        lambda ids, logits: {"input_ids": ids[0], "logits": logits[0]},
        lambda ids, logits: {"input_ids": ids + 250, "logits": logits},  # past the vocabulary
        lambda ids, logits: {"input_ids": ids[:, :0], "logits": logits[:, :0]},
    ],
    ids=["no logits", "fewer logits", "one logit", "no batch", "token out of range", "no tokens"],
)
def test_oracle_file_that_does_not_fit(error_line, copy, change):
    folder = copy("llama")
    stored = np.load(folder / "io.npz")
    np.savez(folder / "io.npz", **change(stored["input_ids"], stored["logits"]))
    assert "io.npz" in error_line(folder)


def test_page_size_that_can_not_be(error_line):
    assert "page_size=0" in error_line(ORACLES / "llama", "--page-size", "0")
