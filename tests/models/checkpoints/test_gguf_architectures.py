"""GGUF files of each architecture hold the model of the Hugging Face folder they were made from.

The folders are those whose logits are checked against transformers. The files are written here by
the rules of llama.cpp's converter, with the gguf package's own table of names.
"""

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.checkpoints.open import open_checkpoint
from models.checkpoints.tensor_names import check_names, find_naming, recipe_table
from models.errors import CheckpointError
from models.families.architectures import architecture_config
from tests.models.checkpoints.test_gguf_file import interleave_rows

ORACLES = Path(__file__).parents[2] / "oracles"
ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def write_config(writer, hf, head_dim):
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for key, add in {
        "sliding_window": writer.add_sliding_window,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
    }.items():
        if hf.get(key) and not (key == "sliding_window" and hf["model_type"].startswith("qwen")):
            add(hf[key])
    writer.add_tokenizer_model("llama")
    writer.add_eos_token_id(hf["eos_token_id"])


def convert(folder, path, *more):
    """The GGUF file of a folder, float32; `more` are further methods of the writer with values."""
    hf = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    arch = ARCHS[hf["model_type"]]
    heads = {"q_proj": hf["num_attention_heads"], "k_proj": hf["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(arch, hf["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    write_config(writer, hf, head_dim)
    for method, *arguments in more:
        getattr(writer, method)(*arguments)
    for name, values in weights.items():
        if name == "lm_head.weight" and hf.get("tie_word_embeddings"):
            continue
        values = np.asarray(values, np.float32)
        for part in heads if arch == gguf.MODEL_ARCH.LLAMA else ():
            if part in name:
                values = interleave_rows(values, heads[part])
        if arch in (gguf.MODEL_ARCH.GEMMA2, gguf.MODEL_ARCH.GEMMA3) and "norm.weight" in name:
            values = values + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "mistral_swa", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_file_and_folder_are_the_same_model(tmp_path, name):
    folder = open_checkpoint(ORACLES / name)
    file = open_checkpoint(convert(ORACLES / name, tmp_path / "m.gguf"))
    # What the format does not hold: Qwen's windows, and Gemma's scale of scores, which llama.cpp
    # takes from the size of a head.
    expected = architecture_config(folder.config | {"use_sliding_window": False})
    if name.startswith("gemma"):
        expected = dataclasses.replace(expected, attention_scale=expected.head_dim**-0.5)
    found = architecture_config(file.config)
    assert found == expected
    check_names(file, recipe_table(found, find_naming(file, found)), found.layers)
    for tensor in file.tensors:
        values = np.asarray(folder.read(tensor), np.float32)
        np.testing.assert_allclose(file.read(tensor), values, rtol=0, atol=2e-7, err_msg=tensor)


def gemma(tmp_path, *more, layers=None):
    folder = tmp_path / "folder"
    folder.mkdir()
    hf = json.loads((ORACLES / "gemma3" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | ({} if layers is None else layers)))
    weights = load_file(ORACLES / "gemma3" / "model.safetensors")
    save_file(weights, folder / "model.safetensors")
    return architecture_config(open_checkpoint(convert(folder, tmp_path / "m.gguf", *more)).config)


def test_largest_gemma_scales_scores_by_the_mean_width_of_a_head(tmp_path):
    config = gemma(tmp_path, layers={"num_hidden_layers": 62})
    assert config.attention_scale == (64 / 4) ** -0.5 != config.head_dim**-0.5


def test_gemma_scales_positions_of_full_layers_alone(tmp_path):
    linear = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR)]
    config = gemma(tmp_path, *linear, ("add_rope_scaling_factor", 8.0))
    assert (config.rope.frequencies[0], config.local_rope.frequencies[0]) == (1 / 8, 1)


@pytest.mark.parametrize("pattern", [3, [True, True, False] * 2 + [True]])
def test_gemma_file_may_give_its_pattern(tmp_path, pattern):
    config = gemma(tmp_path, ("add_sliding_window_pattern", pattern))
    assert config.windows == (16, 16, None, 16, 16, None, 16)


@pytest.mark.parametrize(
    "more, part",
    [
        (("add_attention_scale", 0.5), "gemma3.attention.scale=0.5 is not supported"),
        (("add_logit_scale", 2.0), "gemma3.logit_scale=2.0"),
        (("add_rope_scaling_yarn_log_mul", 0.5), "yarn_log_multiplier=0.5"),
        (("add_bool", "gemma3.attention.causal", False), "gemma3.attention.causal=False"),
        (("add_float32", "gemma3.final_logit_softcapping", float("inf")), "softcapping=inf must"),
        (("add_float32", "gemma3.attention.sliding_window_pattern", 2.5), "pattern=2.5 must be"),
    ],
)
def test_keys_that_change_the_meaning_are_refused(tmp_path, more, part):
    with pytest.raises(CheckpointError) as caught:
        gemma(tmp_path, more)
    assert part in str(caught.value)
