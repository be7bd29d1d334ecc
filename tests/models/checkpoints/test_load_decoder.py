"""Loading: published names and shapes of real models, multimodal names, stacks, bytes, progress."""

import json
import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import models
from models.abstract_decoder import abstract_decoder
from models.checkpoints.checkpoint import Checkpoint, LazyTensor
from models.checkpoints.load_decoder import load_decoder
from models.checkpoints.open import open_checkpoint
from models.checkpoints.recipe import transposed
from models.checkpoints.tensor_names import check_names, find_naming, recipe_table
from models.decoder import Decoder
from models.errors import CheckpointError
from models.experts import ExpertsConfig
from models.families.architectures import architecture_config
from tests.models import numpy_llama, numpy_mixed
from tests.models.numpy_mixed import gemma_config, gpt_oss_config

DATA = Path(__file__).parents[2] / "data"
# Made by transformers 5.24.0 without weights, or saved by it from one layer with few experts; names
# and shapes of gpt-oss's experts are those of the published MXFP4 files, Gemma's begin as google's.
PUBLISHED = json.loads((DATA / "published_tensors.json").read_text())
IMAGE = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
    "multi_modal_projector.mm_input_projection_weight": (1152, 3840),
}


def published(name: str) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """A real model's config.json, and its language tensors with their shapes."""
    hf = json.loads((DATA / "configs" / f"{name}.json").read_text())
    table = PUBLISHED[name]
    shapes = {}
    for tensor, shape in table["tensors"].items():
        for layer in range(table["layers"]) if "{layer}" in tensor else (0,):
            for expert in range(table["experts"]) if "{expert}" in tensor else (0,):
                shapes[tensor.format(layer=layer, expert=expert)] = tuple(shape)
    return hf, shapes


def without_weights(hf: dict, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint that knows names and shapes and can't read anything."""

    def refuse():
        raise AssertionError("weights are read")

    tensors = {
        name: LazyTensor(shape, "", refuse, math.prod(shape), refuse)
        for name, shape in shapes.items()
    }
    return Checkpoint(Path("published"), hf, tensors, refuse)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_are_the_published_names_and_shapes(name):
    hf, shapes = published(name)
    checkpoint = without_weights(hf, shapes | (IMAGE if hf["model_type"] == "gemma3" else {}))
    config = architecture_config(hf)
    recipes = recipe_table(config, find_naming(checkpoint, config))
    check_names(checkpoint, recipes, config.layers)
    del checkpoint.tensors[next(reversed(shapes))]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="has no tensor"):
        check_names(checkpoint, recipes, config.layers)


@pytest.mark.parametrize(
    "name, parameters, file_bytes",
    [
        # keras-hub's counts; the files' sizes as their index says.
        ("gpt-oss-20b", 20_914_757_184, 13_761_264_768),
        ("gpt-oss-120b", 116_829_156_672, 65_248_815_744),
        # keras-hub counts 262144 tokens, the published embedding has 64 rows more.
        ("gemma-3-12b-it", 11_765_788_416 + 64 * 3840, None),
        # The sizes of bfloat16 files as their index says; counts as the model cards say.
        ("Qwen2.5-7B", 7_615_616_512, 15_231_233_024),
        ("Qwen3-30B-A3B", 30_532_122_624, 61_064_245_248),
        ("Mixtral-8x7B-v0.1", 46_702_792_704, 93_405_585_408),
        ("SmolLM3-3B", 3_075_098_624, 6_150_197_248),
        ("OLMo-2-1124-7B", 7_298_617_344, 14_597_234_688),
    ],
)
@pytest.mark.parametrize("scan", [True, False])
def test_real_sizes_without_weights(name, parameters, file_bytes, scan):
    config = architecture_config(published(name)[0])
    model = abstract_decoder(config, scan=scan, dtype="bfloat16")
    arrays = [x for x in jax.tree.leaves(nnx.state(model))]
    packed = [x for x in arrays if x.dtype == np.uint8]
    blocks = sum(x.size for x in packed if x.shape[-1] == 16)
    found = sum(x.size for x in arrays if x.dtype != np.uint8) + 2 * blocks
    assert found == parameters
    if file_bytes is not None:
        assert sum(x.size * x.dtype.itemsize for x in arrays) == file_bytes


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("make", [gemma_config, gpt_oss_config])
def test_abstract_decoders_have_the_shapes_of_real_ones(make, scan):
    config = architecture_config(make("gemma3_text") if make is gemma_config else make())
    real = Decoder(config, nnx.Rngs(0), scan=scan, dtype="bfloat16")
    abstract = abstract_decoder(config, scan=scan, dtype="bfloat16")
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert shapes(real) == shapes(abstract)


def test_windows_and_ropes_of_the_real_models():
    oss = architecture_config(published("gpt-oss-20b")[0])
    assert oss.windows == (128, None) * 12 and oss.period == 2
    assert oss.rope.scale == pytest.approx(0.1 * math.log(32) + 1) and oss.local_rope is None
    gemma = architecture_config(published("gemma-3-12b-it")[0])
    assert gemma.windows == ((1024,) * 5 + (None,)) * 8 and gemma.period == 6
    assert (gemma.vocab_size, gemma.head_dim, gemma.eos_ids) == (262_208, 256, (1, 106))
    assert gemma.attention_scale == 256**-0.5
    local, full = gemma.ropes[0].frequencies, gemma.ropes[5].frequencies
    np.testing.assert_allclose(local[1], 10_000 ** (-2 / 256), rtol=1e-12)
    np.testing.assert_allclose(full[1], 1_000_000 ** (-2 / 256) / 8, rtol=1e-12)


def test_layers_of_the_real_models():
    config = lambda name: architecture_config(published(name)[0])
    smol = config("SmolLM3-3B")
    assert smol.period == 4 and smol.tie_embeddings and set(smol.windows) == {None}
    turned = [max(rope.frequencies) for rope in smol.ropes]
    assert turned == [1, 1, 1, 0] * 9
    np.testing.assert_allclose(smol.ropes[0].frequencies[1], 5_000_000 ** (-2 / 128), rtol=1e-12)
    qwen = config("Qwen3-30B-A3B")
    assert qwen.period == 1 and qwen.experts is not None and qwen.expert_size == 768
    assert (qwen.experts.experts, qwen.experts.top_k, qwen.experts.shares) == (128, 8, "chosen")
    assert config("Mixtral-8x7B-v0.1").experts == ExpertsConfig(experts=8, top_k=2)
    olmo = config("OLMo-2-1124-7B")
    assert (olmo.qk_norm, olmo.norm_places, olmo.period) == ("channels", "after", 1)
    qwen2 = config("Qwen2.5-7B")
    assert qwen2.attention_bias and not qwen2.output_bias and set(qwen2.windows) == {None}


def multimodal(folder: Path, prefix: str, head: str) -> Path:
    """A text checkpoint as a multimodal one has it, with an image encoder beside."""
    config = gemma_config("gemma3_text", tie_word_embeddings=False)
    numpy_mixed.write_folder(folder, config, tokens=9)
    path = folder / "model.safetensors"
    renamed = {
        head if name == "lm_head.weight" else prefix + name.removeprefix("model."): value
        for name, value in load_file(path).items()
    }
    image = {name: np.ones((2, 3), np.float32) for name in IMAGE}
    save_file(renamed | image, path)
    outside = {"model_type": "gemma3", "eos_token_id": [1, 106], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(outside | {"text_config": config}))
    return folder


@pytest.mark.parametrize(
    "prefix, head",
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_multimodal_names_give_the_text_model(tmp_path, prefix, head):
    alone, inside = tmp_path / "alone", tmp_path / "inside"
    alone.mkdir(), inside.mkdir()
    numpy_mixed.write_folder(alone, gemma_config("gemma3_text", tie_word_embeddings=False))
    expected = models.load(alone, dtype="float32")
    found = models.load(multimodal(inside, prefix, head), dtype="float32")
    assert found.config.eos_ids == (1, 106)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(expected))


def test_errors_name_tensors_as_the_file_does(tmp_path):
    folder = multimodal(tmp_path, "language_model.model.", "language_model.lm_head.weight")
    weights = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.self_attn.q_norm.weight"
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        models.load(folder)
    save_file(weights | {"audio_tower.x": np.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="'audio_tower.x' belongs to no parameter"):
        models.load(folder)


def test_image_tensors_are_extra_in_a_text_model(tmp_path):
    numpy_mixed.write_folder(tmp_path, gemma_config("gemma3_text"), tokens=2)
    weights = load_file(tmp_path / "model.safetensors") | {"vision_tower.x": np.ones(1)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'vision_tower.x' belongs to no parameter"):
        models.load(tmp_path)


MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda w: w.pop(BLOCKS), f"has no tensor '{BLOCKS}'"),
        (lambda w: w.update({BLOCKS: w[BLOCKS][:-1]}), r"\(5, 32, 1, 16\) and must be \(6, 32, 1"),
        (lambda w: w.update({BLOCKS: w[BLOCKS].astype(np.float32)}), f"'{BLOCKS}' is float32"),
        (
            lambda w: w.update({"model.norm.weight": np.ones(32, np.int8)}),
            "'model.norm.weight' is int8 and can't become float32",
        ),
    ],
)
def test_packed_experts_must_match(tmp_path, change, part):
    numpy_mixed.write_folder(tmp_path, gpt_oss_config(**MXFP4), tokens=2)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=part):
        models.load(tmp_path)


def test_packed_experts_stay_packed_whatever_the_dtype(tmp_path):
    numpy_mixed.write_folder(tmp_path, gpt_oss_config(**MXFP4), tokens=2)
    model = models.load(tmp_path, dtype="bfloat16")
    kinds = {str(x.dtype) for x in jax.tree.leaves(nnx.state(model))}
    assert kinds == {"uint8", "bfloat16"}
    blocks = load_file(tmp_path / "model.safetensors")[BLOCKS]
    np.testing.assert_array_equal(model.layers[1].experts.down_blocks[...], blocks)


@pytest.mark.parametrize("layers, period, tail", [(7, 6, 1), (12, 6, 0), (5, 5, 0)])
def test_stacks_hold_the_layers_of_each_place(tmp_path, layers, period, tail):
    config = gemma_config("gemma3_text", num_hidden_layers=layers)
    if layers == 5:  # nothing repeats
        kinds = [numpy_mixed.FULL, numpy_mixed.FULL, *[numpy_mixed.SLIDING] * 3]
        config |= {"layer_types": kinds}
    numpy_mixed.write_folder(tmp_path, config, tokens=2)
    model = models.load(tmp_path, dtype="float32", scan=True)
    assert (len(model.pattern), len(model.layers)) == (period, tail)
    weights = load_file(tmp_path / "model.safetensors")
    for layer in range(layers):
        stacked = layer < model.repeats * period
        block = model.pattern[layer % period] if stacked else model.layers[layer % period]
        found = block.mlp.down[...][layer // period] if stacked else block.mlp.down[...]
        expected = weights[f"model.layers.{layer}.mlp.down_proj.weight"].T
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scan", [True, False])
def test_progress_counts_the_bytes_of_the_file(tmp_path, scan):
    stored = numpy_llama.write_folder(tmp_path, numpy_llama.make_config(), shards=3)
    seen = []
    models.load(tmp_path, scan=scan, progress=lambda done, of: seen.append((done, of)))
    size = sum(value.nbytes for value in stored.values())
    assert [of for _, of in seen] == [size] * len(seen)
    done = [done for done, _ in seen]
    assert done == sorted(set(done)) and done[-1] == size
    assert len(seen) > 10


def test_weights_do_not_lie_in_the_file(tmp_path):
    numpy_llama.write_folder(tmp_path, numpy_llama.make_config())
    model = models.load(tmp_path, dtype="float32")
    before = np.array(model.embedding[...])
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:  # a mapped file changes with it
        file.seek(-path.stat().st_size // 2, 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    np.testing.assert_array_equal(model.embedding[...], before)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nnx.state(model)))


def test_every_tensor_is_released_once(tmp_path):
    numpy_llama.write_folder(tmp_path, numpy_llama.make_config(), tokens=2)
    checkpoint, released = open_checkpoint(tmp_path), []
    tensors = {
        name: LazyTensor(
            t.shape, t.dtype, t.read, t.nbytes, lambda name=name: released.append(name)
        )
        for name, t in checkpoint.tensors.items()
    }
    watched = Checkpoint(checkpoint.path, checkpoint.config, tensors, checkpoint.tokenizer_loader)
    load_decoder(watched, dtype="bfloat16", scan=True)
    assert sorted(released) == sorted(tensors)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(1, 1), (65, 3), (2, 3, 130), (64, 64)])
def test_transposed_moves_the_last_axis_to_the_front(dtype, shape):
    x = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    for value in (x, x[::-1]):
        np.testing.assert_array_equal(transposed(value), np.moveaxis(value, -1, 0))
