"""The names and shapes of a published checkpoint's tensors, and which parameter each becomes.

A recipe says how one parameter of a `Decoder` is made. The table of recipes depends on the config
alone, so one table serves every architecture.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.expert_names import (
    FUSED,
    ExpertNames,
    expert_recipes,
    find_expert_names,
    gpt_oss_recipes,
)
from models.checkpoints.recipe import Recipe, linear, one, transposed
from models.config import DecoderConfig
from models.errors import CheckpointError
from models.families.gemma import IMAGE_TENSORS

ParameterPath = tuple[str, ...]  # inside a block, ("attention", "out"), or the model, ("head",)

# Tensors without a parameter that a checkpoint may have: starts of their names by model_type, and
# the end of the names of buffers that old exports store.
SKIPPED = {"gemma3": IMAGE_TENSORS}
DERIVED = "rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a checkpoint names its language model's tensors."""

    model: str = "model."  # start of the names, but for the head's
    head: str = "lm_head.weight"
    experts: ExpertNames = FUSED  # of a mixture of experts, inside a layer
    head_alone: bool = False  # files of tied models may store the matrix under the head's name

    @property
    def embedding(self) -> str:
        """Name of the embedding."""
        return self.head if self.head_alone else self.model + "embed_tokens.weight"

    @property
    def layer(self) -> str:
        """Start of the names of a layer's tensors, with `{layer}` for its number."""
        return self.model + "layers.{layer}."


# The first is that of text models. Multimodal checkpoints, in which the language model stands
# beside an image encoder, use one of the others.
NAMINGS = (
    Naming(),
    Naming("language_model.model.", "language_model.lm_head.weight"),
    Naming("model.language_model.", "lm_head.weight"),
)


def find_naming(checkpoint: Checkpoint, config: DecoderConfig) -> Naming:
    """The naming under which this checkpoint has its tensors; the published one if none fits."""
    final = lambda naming: naming.model + "norm.weight"
    naming = next((n for n in NAMINGS if final(n) in checkpoint.tensors), NAMINGS[0])
    if config.tie_embeddings and naming.embedding not in checkpoint.tensors:
        naming = dataclasses.replace(naming, head_alone=naming.head in checkpoint.tensors)
    if True not in config.sparse_layers:
        return naming
    layer = naming.layer.format(layer=config.sparse_layers.index(True))
    experts = find_expert_names(config.architecture, layer, checkpoint.tensors)
    return dataclasses.replace(naming, experts=experts)


def tensor_names(
    recipes: dict[ParameterPath, Recipe], layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the recipes read, with its shape."""
    for recipe in recipes.values():
        for name, shape in recipe.sources.items():
            own = range(layers) if recipe.layers is None else recipe.layers
            for layer in own if "{layer}" in name else (0,):
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
    spare = set() if ("head",) in recipes else {naming.head for naming in NAMINGS}
    skipped = SKIPPED.get(checkpoint.config["model_type"], ())
    for name in checkpoint.tensors.keys() - expected.keys() - spare:
        if not name.startswith(skipped) and not name.endswith(DERIVED):
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r} belongs to no parameter.")


def recipe_table(config: DecoderConfig, naming: Naming = NAMINGS[0]) -> dict[ParameterPath, Recipe]:
    """Every parameter's recipe. Names of a block's tensors have `{layer}` for the layer number."""
    hidden, dim = config.hidden_size, config.head_dim
    layer = naming.layer
    attention = layer + "self_attn."
    heads = {"q": config.q_heads, "k": config.kv_heads, "v": config.kv_heads}

    def by_kv_head(q, k, v):  # [heads * dim, ...] each, to [kv_heads, group + 2, dim, ...]
        split = lambda x: x.reshape(config.kv_heads, -1, dim, *x.shape[1:])
        return np.concatenate([split(q), split(k), split(v)], axis=1)

    table = {
        ("embedding",): one(naming.embedding, config.vocab_size, hidden),
        ("norm", "weight"): one(naming.model + "norm.weight", hidden),
        ("attention", "qkv"): Recipe(
            {attention + f"{x}_proj.weight": (n * dim, hidden) for x, n in heads.items()},
            lambda q, k, v: transposed(by_kv_head(q, k, v)),
        ),
        ("attention", "out"): linear(attention + "o_proj.weight", hidden, config.q_heads * dim),
    }
    for path, name in norm_names(config).items():
        table[(path, "weight")] = one(layer + name + ".weight", hidden)
    if not config.tie_embeddings:
        table[("head",)] = one(naming.head, config.vocab_size, hidden)
    if config.attention_bias:
        table[("attention", "qkv_bias")] = Recipe(
            {attention + f"{x}_proj.bias": (n * dim,) for x, n in heads.items()}, by_kv_head
        )
    if config.output_bias:
        table[("attention", "out_bias")] = one(attention + "o_proj.bias", hidden)
    if config.qk_norm:
        for x in "qk":
            size = dim * (heads[x] if config.qk_norm == "channels" else 1)
            table[("attention", f"{x}_norm", "weight")] = one(attention + f"{x}_norm.weight", size)
    if config.attention_sinks:
        table[("attention", "sinks")] = one(attention + "sinks", config.q_heads)
    return table | second_half(config, naming)


def second_half(config: DecoderConfig, naming: Naming) -> dict[ParameterPath, Recipe]:
    """Recipes of the MLPs and of the mixtures of experts, each with the layers that have them."""
    hidden, inner, layer = config.hidden_size, config.intermediate_size, naming.layer
    sparse = config.sparse_layers
    parts = {"mlp": mlp_recipes(layer + "mlp.", hidden, inner, biases=config.mlp_bias)}
    if config.experts is not None:
        inner = config.expert_size or inner
        if config.architecture == "gpt_oss":
            parts["experts"] = gpt_oss_recipes(layer, config.experts, hidden, inner)
        else:
            names = naming.experts
            parts["experts"] = expert_recipes(layer, names, config.experts, hidden, inner)
    table = {}
    for part, recipes in parts.items():
        own = tuple(n for n, experts in enumerate(sparse) if experts == (part == "experts"))
        for name, recipe in recipes.items() if own else ():
            table[(part, name)] = dataclasses.replace(recipe, layers=own)
    return table


def norm_names(config: DecoderConfig) -> dict[str, str]:
    """The checkpoint's names of a block's norms, by the names that `Block` gives them.

    `post_attention_layernorm` is the norm before the MLP, except in families that have norms after
    attention and MLP: there it is applied to the attention's output.
    """
    if config.norm_places == "before":
        return {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    after = {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    if config.norm_places == "after":
        return after
    return after | {"attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}


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
