"""The names and shapes of a published checkpoint's tensors, and which parameter each becomes.

A recipe says how one parameter of a `Decoder` is made. The table of recipes depends on the config
alone, so one table serves every architecture.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from models.checkpoints.checkpoint import Checkpoint
from models.config import DecoderConfig
from models.errors import CheckpointError
from models.experts import ExpertsConfig
from models.families.gemma import IMAGE_TENSORS
from models.mxfp4 import BLOCK, BLOCK_BYTES

ParameterPath = tuple[str, ...]  # inside a block, ("attention", "out"), or the model, ("head",)

# Tensors without a parameter that a checkpoint may have: starts of their names by model_type, and
# the end of the names of buffers that old exports store.
SKIPPED = {"gemma3": IMAGE_TENSORS}
DERIVED = "rotary_emb.inv_freq"

TRANSPOSE_ROWS = 64  # a block of 64 rows, and the columns it becomes, fit in a core's cache


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one parameter of a block, or of the model, is made from tensors of the checkpoint."""

    sources: dict[str, tuple[int, ...]]  # names and shapes in the checkpoint
    build: Callable[..., np.ndarray]  # takes the sources' values, returns the parameter's


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The start of the names of a checkpoint's language model, and the name of its head."""

    model: str = "model."
    head: str = "lm_head.weight"


# The first is that of text models. Multimodal checkpoints, in which the language model stands
# beside an image encoder, use one of the others.
PREFIXES = (
    Prefix(),
    Prefix("language_model.model.", "language_model.lm_head.weight"),
    Prefix("model.language_model.", "lm_head.weight"),
)


def find_prefix(checkpoint: Checkpoint) -> Prefix:
    """The prefix under which this checkpoint has its embedding; that of text models if none has."""
    embedding = lambda prefix: prefix.model + "embed_tokens.weight"
    return next((p for p in PREFIXES if embedding(p) in checkpoint.tensors), PREFIXES[0])


def tensor_names(
    recipes: dict[ParameterPath, Recipe], layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the recipes read, with its shape."""
    for recipe in recipes.values():
        for name, shape in recipe.sources.items():
            for layer in range(layers) if "{layer}" in name else (0,):
                yield name.format(layer=layer), shape


def check_names(checkpoint: Checkpoint, recipes: dict[ParameterPath, Recipe], layers: int) -> None:
    """Checks that every expected tensor is there with its shape, and that no other one is.

    Raises:
      CheckpointError: names the first tensor that is missing, misshaped or left over.
    """
    expected = dict(tensor_names(recipes, layers))
    for name, shape in expected.items():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: has no tensor {name!r}.")
        found = tuple(checkpoint.shape(name))
        if found != shape:
            raise CheckpointError(f"{checkpoint.path}: {name!r} is {found} and must be {shape}.")
    # Some checkpoints with a tied head store it a second time.
    spare = set() if ("head",) in recipes else {prefix.head for prefix in PREFIXES}
    skipped = SKIPPED.get(checkpoint.config["model_type"], ())
    for name in checkpoint.tensors.keys() - expected.keys() - spare:
        if not name.startswith(skipped) and not name.endswith(DERIVED):
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r} belongs to no parameter.")


def recipe_table(
    config: DecoderConfig, prefix: Prefix = PREFIXES[0]
) -> dict[ParameterPath, Recipe]:
    """Every parameter's recipe. Names of a block's tensors have `{layer}` for the layer number."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    layer = prefix.model + "layers.{layer}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    heads = {"q": config.q_heads, "k": config.kv_heads, "v": config.kv_heads}

    def by_kv_head(q, k, v):  # [heads * dim, ...] each, to [kv_heads, group + 2, dim, ...]
        split = lambda x: x.reshape(config.kv_heads, -1, dim, *x.shape[1:])
        return np.concatenate([split(q), split(k), split(v)], axis=1)

    table = {
        ("embedding",): one(prefix.model + "embed_tokens.weight", config.vocab_size, hidden),
        ("norm", "weight"): one(prefix.model + "norm.weight", hidden),
        ("attention", "qkv"): Recipe(
            {attention + f"{x}_proj.weight": (n * dim, hidden) for x, n in heads.items()},
            lambda q, k, v: transposed(by_kv_head(q, k, v)),
        ),
        ("attention", "out"): linear(attention + "o_proj.weight", hidden, config.q_heads * dim),
    }
    for path, name in norm_names(config).items():
        table[(path, "weight")] = one(layer + name + ".weight", hidden)
    if not config.tie_embeddings:
        table[("head",)] = one(prefix.head, config.vocab_size, hidden)
    if config.attention_bias:
        table[("attention", "qkv_bias")] = Recipe(
            {attention + f"{x}_proj.bias": (n * dim,) for x, n in heads.items()}, by_kv_head
        )
    if config.output_bias:
        table[("attention", "out_bias")] = one(attention + "o_proj.bias", hidden)
    if config.qk_norm:
        for x in "qk":
            table[("attention", f"{x}_norm", "weight")] = one(attention + f"{x}_norm.weight", dim)
    if config.attention_sinks:
        table[("attention", "sinks")] = one(attention + "sinks", config.q_heads)
    if config.experts is None:
        parts = mlp_recipes(mlp, hidden, inner, biases=config.mlp_bias)
    else:
        parts = expert_recipes(mlp, config.experts, hidden, inner)
    return table | {("mlp", name): recipe for name, recipe in parts.items()}


def norm_names(config: DecoderConfig) -> dict[str, str]:
    """The checkpoint's names of a block's norms, by the names that `Block` gives them.

    `post_attention_layernorm` is the norm before the MLP, except in Gemma, where it is applied to
    the attention's output.
    """
    if not config.sandwich_norms:
        return {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    return {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }


def mlp_recipes(name: str, hidden: int, inner: int, *, biases: bool) -> dict[str, Recipe]:
    """Recipes of the parameters of `GatedMLP`."""
    table = {
        "gate_up": Recipe(
            {name + f"{x}_proj.weight": (inner, hidden) for x in ("gate", "up")},
            lambda gate, up: transposed(np.stack([gate, up])),
        ),
        "down": linear(name + "down_proj.weight", hidden, inner),
    }
    if biases:
        table["gate_up_bias"] = Recipe(
            {name + f"{x}_proj.bias": (inner,) for x in ("gate", "up")},
            lambda gate, up: np.stack([gate, up]),
        )
        table["down_bias"] = one(name + "down_proj.bias", hidden)
    return table


def expert_recipes(name: str, config: ExpertsConfig, hidden: int, inner: int) -> dict[str, Recipe]:
    """Recipes of the parameters of `Experts`, which keep the published layout of the experts."""
    count, experts = config.experts, name + "experts."
    table = {
        "router": linear(name + "router.weight", count, hidden),
        "router_bias": one(name + "router.bias", count),
        "gate_up_bias": one(experts + "gate_up_proj_bias", count, 2 * inner),
        "down_bias": one(experts + "down_proj_bias", count, hidden),
    }
    for part, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        proj = experts + part + "_proj"
        if config.packed:
            blocks = (count, rows, columns // BLOCK)
            table[part + "_blocks"] = one(proj + "_blocks", *blocks, BLOCK_BYTES)
            table[part + "_scales"] = one(proj + "_scales", *blocks)
        else:
            table[part] = one(proj, count, columns, rows)
    return table


def one(name: str, *shape: int) -> Recipe:
    """A parameter that is a tensor of the checkpoint, unchanged."""
    return Recipe({name: shape}, lambda x: x)


def linear(name: str, rows: int, columns: int) -> Recipe:
    """A matrix that is `[out, in]` in the checkpoint and `[in, out]` in the model."""
    return Recipe({name: (rows, columns)}, transposed)


def transposed(x: np.ndarray) -> np.ndarray:
    """Moves the last axis to the front, as a copy, block by block.

    numpy's own copy of a transposed bfloat16 matrix runs at 0.2 GB/s, this one at 2 GB/s.
    """
    bits = np.ascontiguousarray(x).view(f"u{x.itemsize}").reshape(-1, x.shape[-1])
    out = np.empty(bits.shape[::-1], bits.dtype)
    for row in range(0, len(bits), TRANSPOSE_ROWS):
        out[:, row : row + TRANSPOSE_ROWS] = bits[row : row + TRANSPOSE_ROWS].T
    return out.view(x.dtype).reshape(x.shape[-1], *x.shape[:-1])
