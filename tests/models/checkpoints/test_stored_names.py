"""What a file stores decides: a head beside a tied embedding, and the names of experts."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import models
from models.errors import CheckpointError
from tests.scripts.check_checkpoint.oracles import ORACLES

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def copy(tmp_path):
    """An oracle with its tensors and its config changed."""

    def make(oracle, change, **keys):
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(ORACLES / oracle, folder)
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def load(folder):
    return models.load(folder, dtype="float32")


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


def test_a_stored_head_that_differs_is_used_though_the_config_says_tied(copy):
    found = load(copy("qwen2", dict, tie_word_embeddings=True))
    assert not found.config.tie_embeddings
    assert_same(found, load(ORACLES / "qwen2"))


def test_one_value_is_enough_to_differ(copy):
    def change(weights):
        head = weights[EMBEDDING].copy()
        head[-1, -1] = 2
        return weights | {HEAD: head}

    found = load(copy("qwen2", change, tie_word_embeddings=True))
    assert found.head is not None and found.head[-1, -1] == 2 != found.embedding[-1, -1]


def test_a_stored_head_that_is_the_embedding_is_tied(copy):
    change = lambda weights: weights | {HEAD: weights[EMBEDDING]}
    found = load(copy("qwen2", change, tie_word_embeddings=True))
    assert found.config.tie_embeddings and found.head is None


def test_a_stored_head_of_another_type_is_compared_by_value(copy):
    change = lambda weights: weights | {HEAD: weights[EMBEDDING].astype(np.float32)}
    assert load(copy("qwen2", change, tie_word_embeddings=True)).head is None


def test_a_tied_matrix_may_be_stored_under_the_name_of_the_head_alone(copy):
    without = lambda weights: {k: v for k, v in weights.items() if k != EMBEDDING}
    found = load(copy("qwen2", without, tie_word_embeddings=True))
    stored = load_file(ORACLES / "qwen2" / "model.safetensors")[HEAD]
    np.testing.assert_array_equal(found.embedding[...], stored.astype(np.float32))
    assert found.head is None
    with pytest.raises(CheckpointError, match=EMBEDDING):
        load(copy("qwen2", without))


def test_a_stored_head_of_another_shape_is_refused(copy):
    change = lambda weights: weights | {HEAD: weights[HEAD][:-1]}
    with pytest.raises(CheckpointError, match=rf"'{HEAD}' is \(40, 32\) and must be \(41, 32\)"):
        load(copy("qwen2", change, tie_word_embeddings=True))


PARTS = {
    "qwen3_moe": ("mlp.", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.", "w1", "w3", "w2"),
}


def renamed(weights, old, new):
    """The experts' matrices under another architecture's names."""
    names = {f".{a}.": f".{b}." for a, b in zip(PARTS[old][1:], PARTS[new][1:], strict=True)}
    out = {}
    for name, value in weights.items():
        if "experts" in name:
            part = next(part for part in names if part in name)
            name = name.replace(part, names[part])
        name = name.replace("." + PARTS[old][0], "." + PARTS[new][0])
        out[name] = value
    return out


def fused(weights, old):
    """The experts as transformers 5 holds them: gate's rows, then up's, of all experts."""
    weights, out = renamed(weights, old, "qwen3_moe"), {}
    for name, value in weights.items():
        if "experts" not in name:
            out[name] = value
        elif ".experts.0.down_proj" in name:
            start = name.removesuffix("0.down_proj.weight")
            count = sum(n.startswith(start) and "down_proj" in n for n in weights)
            every = lambda part, s=start, n=count: np.stack(
                [weights[f"{s}{e}.{part}_proj.weight"] for e in range(n)]
            )
            out[start + "gate_up_proj"] = np.concatenate([every("gate"), every("up")], axis=1)
            out[start + "down_proj"] = every("down")
    return out


@pytest.mark.parametrize("oracle, other", [("qwen3_moe", "mixtral"), ("mixtral", "qwen3_moe")])
def test_experts_load_alike_under_all_names(copy, oracle, other):
    expected = load(ORACLES / oracle)
    for change in (lambda w: renamed(w, oracle, other), lambda w: fused(w, oracle)):
        folder = copy(oracle, change)
        assert load_file(folder / "model.safetensors").keys() != load_file(
            ORACLES / oracle / "model.safetensors"
        )
        assert_same(load(folder), expected)


def test_a_missing_expert_is_named_as_the_file_names_it(copy):
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    without = lambda weights: {k: v for k, v in weights.items() if k != name}
    with pytest.raises(CheckpointError, match=f"has no tensor '{name}'"):
        load(copy("mixtral", without))


def test_an_mlp_where_experts_must_be_is_named(copy):
    """The layers that have experts follow from the config, not from what the file has."""
    folder = copy("qwen3_moe_mixed", dict, mlp_only_layers=[])
    with pytest.raises(CheckpointError, match=r"has no tensor 'model.layers.3.mlp.gate.weight'"):
        load(folder)
