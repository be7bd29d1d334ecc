"""Fills a `Decoder` from a checkpoint: a table of which tensors make which parameter."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import llama, mistral, qwen3
from models.checkpoints import Checkpoint, CheckpointError
from models.config import DecoderConfig
from models.decoder import Decoder

ARCHITECTURES: dict[str, Callable[[dict], DecoderConfig]] = {
    "llama": llama.decoder_config,
    "mistral": mistral.decoder_config,
    "qwen3": qwen3.decoder_config,
}

Path = tuple[str, ...]
Progress = Callable[[int, int], None]  # tensors done, of how many


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One parameter of a block (or of the model) from tensors of the checkpoint."""

    sources: dict[str, tuple[int, ...]]  # name and shape as the checkpoint has them
    build: Callable[..., np.ndarray]  # from their values, to the parameter's shape


def architecture_config(hf: dict) -> DecoderConfig:
    """Reads a Hugging Face config; CheckpointError names an architecture that is not known."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise CheckpointError(f"model_type={kind!r} must be one of {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[kind](hf)


def load_decoder(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    scan: bool,
    progress: Progress | None = None,
) -> Decoder:
    """Builds the model and fills every parameter, tensor by tensor.

    Raises:
      CheckpointError: an unknown architecture; a missing, extra or misshaped tensor, by name.
    """
    config = architecture_config(checkpoint.config)
    model = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), scan=scan, dtype=dtype))
    graph, state = nnx.split(model)
    recipes = recipe_table(config)
    _check_names(checkpoint, recipes)
    parameters = nnx.to_flat_state(state)
    filled = []
    for done, (path, parameter) in enumerate(parameters):
        value = _fill(checkpoint, recipes, path, parameter.get_value(), config.layers)
        filled.append((path, parameter.replace(value)))
        if progress is not None:
            progress(done + 1, len(parameters))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def recipe_table(config: DecoderConfig) -> dict[Path, Recipe]:
    """Every parameter's recipe; a block's names have `{layer}` where the number stands."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads = {"q": config.q_heads, "k": config.kv_heads, "v": config.kv_heads}
    layer = "model.layers.{layer}."
    attention, mlp = layer + "self_attn.", layer + "mlp."

    def by_kv_head(q, k, v):  # [heads * dim, ...] each, to [kv_heads, group + 2, dim, ...]
        split = lambda x: x.reshape(config.kv_heads, -1, dim, *x.shape[1:])
        return np.concatenate([split(q), split(k), split(v)], axis=1)

    def one(name: str, *shape: int, build=lambda x: x) -> Recipe:
        return Recipe({name: shape}, build)

    table = {
        ("embedding",): one("model.embed_tokens.weight", config.vocab_size, hidden),
        ("norm", "weight"): one("model.norm.weight", hidden),
        ("attention_norm", "weight"): one(layer + "input_layernorm.weight", hidden),
        ("mlp_norm", "weight"): one(layer + "post_attention_layernorm.weight", hidden),
        ("attention", "qkv"): Recipe(
            {attention + f"{x}_proj.weight": (n * dim, hidden) for x, n in heads.items()},
            lambda q, k, v: np.moveaxis(by_kv_head(q, k, v), -1, 0),
        ),
        ("attention", "out"): one(
            attention + "o_proj.weight", hidden, config.q_heads * dim, build=np.transpose
        ),
        ("mlp", "gate_up"): Recipe(
            {mlp + f"{x}_proj.weight": (inner, hidden) for x in ("gate", "up")},
            lambda gate, up: np.moveaxis(np.stack([gate, up]), -1, 0),
        ),
        ("mlp", "down"): one(mlp + "down_proj.weight", hidden, inner, build=np.transpose),
    }
    if not config.tie_embeddings:
        table[("head",)] = one("lm_head.weight", config.vocab_size, hidden)
    if config.attention_bias:
        table[("attention", "qkv_bias")] = Recipe(
            {attention + f"{x}_proj.bias": (n * dim,) for x, n in heads.items()}, by_kv_head
        )
    if config.output_bias:
        table[("attention", "out_bias")] = one(attention + "o_proj.bias", hidden)
    if config.mlp_bias:
        table[("mlp", "gate_up_bias")] = Recipe(
            {mlp + f"{x}_proj.bias": (inner,) for x in ("gate", "up")},
            lambda gate, up: np.stack([gate, up]),
        )
        table[("mlp", "down_bias")] = one(mlp + "down_proj.bias", hidden)
    if config.qk_norm:
        for x in "qk":
            table[("attention", f"{x}_norm", "weight")] = one(attention + f"{x}_norm.weight", dim)
    return table


def _names(recipes: dict[Path, Recipe], layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for recipe in recipes.values():
        for name, shape in recipe.sources.items():
            for layer in range(layers) if "{layer}" in name else (0,):
                yield name.format(layer=layer), shape


def _check_names(checkpoint: Checkpoint, recipes: dict[Path, Recipe]) -> None:
    """Every expected tensor is there with its shape, and nothing else is."""
    expected = dict(_names(recipes, checkpoint.config["num_hidden_layers"]))
    for name, shape in expected.items():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: has no tensor {name!r}.")
        found = tuple(checkpoint.shape(name))
        if found != shape:
            raise CheckpointError(f"{checkpoint.path}: {name!r} is {found} and must be {shape}.")
    # Derived buffers that old exports carry; a tied head is stored twice by some.
    spare = {"lm_head.weight"} if ("head",) not in recipes else set()
    for name in checkpoint.tensors:
        if name not in expected and name not in spare and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r} belongs to no parameter.")


def _fill(
    checkpoint: Checkpoint,
    recipes: dict[Path, Recipe],
    path: tuple,
    abstract: jax.ShapeDtypeStruct,
    layers: int,
) -> jax.Array:
    """Reads one parameter; a scanned block's is stacked over the layers."""
    scanned = path[0] == "layers" and not isinstance(path[1], int)
    single = path[1] if path[0] == "layers" and not scanned else 0
    own = path if path[0] != "layers" else path[1:] if scanned else path[2:]
    recipe = recipes[tuple(own)]

    def read(layer: int) -> np.ndarray:
        return recipe.build(*(checkpoint.read(name.format(layer=layer)) for name in recipe.sources))

    out = np.empty(abstract.shape, abstract.dtype)
    if scanned:
        for layer in range(layers):
            out[layer] = read(layer)
    else:
        out[...] = read(single)
    return jnp.asarray(out)
