"""scripts/check_checkpoint.py: right on published layouts and odd shapes, and not blind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models.families.architectures import architecture_config
from scripts import check_checkpoint
from scripts.shared.command import run_command
from tests.models.numpy_llama import make_config, write_folder

ROOT = Path(__file__).parents[2]
ORACLES = ROOT / "tests" / "oracles"
# Float32 rounding of logits whose deviation is near 1; what is wrong is off by more than 1e-3.
ROUNDING = 1e-4


@pytest.fixture(autouse=True)
def settings():
    """Restores the matmul precision that the script sets."""
    before = jax.config.values["jax_default_matmul_precision"]
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code and what it wrote."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_checkpoint.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_command(check_checkpoint.main, check_checkpoint.Args)
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return run


@pytest.fixture
def differences(check):
    """Runs the command; returns its exit code and its two figures."""

    def run(*arguments):
        code, out, err = check(*arguments)
        assert err == ""
        found = json.loads(out.splitlines()[-1])
        assert set(found) == {"prefill_max_abs_diff", "decode_max_abs_diff"}
        return code, found

    return run


def largest_difference(folder, *, page_size=8, scan=False):
    """As the script's, in chunks of few shapes, as each is compiled."""
    model = models.load(folder, dtype="float32", scan=scan)
    stored = np.load(folder / "io.npz")
    tokens, logits = stored["input_ids"], stored["logits"]
    chunks = [16] * (tokens.shape[1] // 16) + [1] * (tokens.shape[1] % 16)
    args = check_checkpoint.Args(dir=folder, page_size=page_size)
    return check_checkpoint.largest_difference(model, tokens, logits, chunks, args)


@pytest.fixture
def copy(tmp_path):
    """Copies an oracle, with keys of its config changed (None removes one)."""

    def make(oracle, **keys):
        folder = tmp_path / oracle
        shutil.copytree(ORACLES / oracle, folder)
        config = json.loads((folder / "config.json").read_text()) | keys
        config = {k: v for k, v in config.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def error_line(check):
    """Runs a command that must fail with one line on stderr and code 2; returns the line."""

    def run(*arguments):
        code, out, err = check(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err

    return run


@pytest.mark.parametrize(
    "oracle, scan",
    [
        ("llama", "--scan"),
        ("llama3_rope", "--scan"),
        ("mistral_swa", "--scan"),
        ("mistral_swa", "--no-scan"),
        ("qwen3", "--no-scan"),
        ("gemma3", "--scan"),
        ("gpt_oss_mxfp4", "--no-scan"),
        # gemma3 and gpt_oss otherwise: test_gemma_gpt_oss.py
        pytest.param("llama", "--no-scan", marks=pytest.mark.slow),
        pytest.param("llama3_rope", "--no-scan", marks=pytest.mark.slow),
        pytest.param("qwen3", "--scan", marks=pytest.mark.slow),
    ],
)
def test_published_layouts_give_published_logits(differences, oracle, scan):
    code, found = differences(ORACLES / oracle, "--json", scan)
    assert code == 0
    assert max(found.values()) < ROUNDING


@pytest.mark.parametrize("oracle, page_size", [("mistral_swa", 7), ("llama", 512)])
def test_page_size_does_not_matter(oracle, page_size):
    assert largest_difference(ORACLES / oracle, page_size=page_size) < ROUNDING


def test_wrong_config_shows_in_both_figures(differences, copy):
    code, found = differences(copy("mistral_swa", sliding_window=23))
    assert code == 1
    assert min(found.values()) > 1e-3


@pytest.mark.parametrize(
    "oracle, rope",
    [
        ("llama", {"rope_type": "default", "rope_theta": 11000.0}),
        ("llama3_rope", {"rope_type": "default", "rope_theta": 500000.0}),
    ],
)
def test_wrong_rope_shows(copy, oracle, rope):
    assert largest_difference(copy(oracle, rope_parameters=rope)) > 1e-3


def test_wrong_norm_weights_show(differences, copy):  # what leaving out q/k norms would do
    folder = copy("qwen3")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = np.ones_like(weights[name])
    save_file(weights, folder / "model.safetensors")
    code, found = differences(folder)
    assert code == 1
    assert min(found.values()) > 1e-3


def test_nan_is_no_pass(differences, copy):
    folder = copy("llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, folder / "model.safetensors")
    assert differences(folder)[0] == 1


def test_tolerance_decides_the_exit_code(differences):
    assert differences(ORACLES / "llama", "--tol", "1e-9")[0] == 1


SHAPES = {
    "heads_7_1": make_config(num_attention_heads=7, num_key_value_heads=1, head_dim=16),
    "head_dim_80_linear_rope": make_config(
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=80,
        rope_scaling={"type": "linear", "factor": 2.5},  # as older files have it
    ),
    "head_dim_24_window_19": make_config("mistral", head_dim=24, sliding_window=19),
    "biases_tied": make_config(
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        num_attention_heads=5,
        num_key_value_heads=None,  # as many
        head_dim=None,  # hidden_size / 5
    ),
    "qwen3_window_off_biases": make_config(
        "qwen3", use_sliding_window=False, sliding_window=5, attention_bias=True
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_agree_with_plain_numpy(tmp_path, name):
    write_folder(tmp_path, SHAPES[name])
    assert largest_difference(tmp_path) < ROUNDING


MIXED = {"use_sliding_window": True, "sliding_window": 19, "num_hidden_layers": 3}


def test_mixed_windows_agree_with_plain_numpy(tmp_path):
    types = ["full_attention", "sliding_attention", "full_attention"]
    write_folder(tmp_path, make_config("qwen3", **MIXED, layer_types=types))
    assert largest_difference(tmp_path) < ROUNDING


@pytest.mark.parametrize(
    "keys, windows",
    [
        ({"max_window_layers": 2}, (None, None, 19)),  # older files have no layer_types
        ({"max_window_layers": 0}, (19, 19, 19)),
        ({"max_window_layers": 28}, (None, None, None)),
        ({"use_sliding_window": False}, (None, None, None)),
    ],
)
def test_windows_of_older_qwen3_files(keys, windows):
    assert architecture_config(make_config("qwen3", **MIXED | keys)).windows == windows


def test_layers_are_scanned_on_tpus_and_unrolled_elsewhere(tmp_path, monkeypatch):
    write_folder(tmp_path, make_config("qwen3", **MIXED, max_window_layers=1), tokens=1)
    assert not models.load(tmp_path, dtype="float32").repeats
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not models.load(tmp_path, dtype="float32").repeats
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    scanned = models.load(tmp_path, dtype="float32")
    assert scanned.scan and scanned.repeats == 1 and len(scanned.pattern) == 3


@pytest.mark.parametrize("tokens", [1, 2])
def test_short_inputs(differences, tmp_path, tokens):
    write_folder(tmp_path, make_config(), tokens=tokens, batch=1)
    code, found = differences(tmp_path)
    assert code == 0 and max(found.values()) < ROUNDING


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 11, 37, 96, 120])
def test_chunks_are_uneven_and_cover_every_token(tokens):
    chunks = check_checkpoint.uneven_chunks(tokens)
    assert sum(chunks) == tokens and min(chunks) == 1
    assert chunks[-1] == 1  # the last third, one by one
    assert tokens < 12 or len({n for n in chunks if n > 1}) == 2


def test_shards_with_an_index(tmp_path):
    write_folder(tmp_path, make_config(), shards=3)
    assert not (tmp_path / "model.safetensors").exists()
    assert largest_difference(tmp_path, scan=True) < ROUNDING


def test_bfloat16_weights_run_in_float32(tmp_path):
    stored = write_folder(tmp_path, make_config(), dtype=ml_dtypes.bfloat16)
    assert stored["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert largest_difference(tmp_path, scan=True) < ROUNDING


def test_derived_buffers_and_the_tied_head_are_allowed(differences, copy):
    folder = copy("llama")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(weights, folder / "model.safetensors")
    assert differences(folder)[0] == 0


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
        ({"hidden_size": None}, "hidden_size"),
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


def run_process(*arguments):
    command = [sys.executable, ROOT / "scripts" / "check_checkpoint.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_process_prints_one_json_object():
    result = run_process(ORACLES / "mistral_swa", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert max(json.loads(result.stdout).values()) < ROUNDING


def test_process_fails_with_one_line(copy):
    result = run_process(copy("llama", model_type="mamba"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "model_type='mamba'" in result.stderr
