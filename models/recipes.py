"""Which tensors of a published checkpoint make which parameter of a `Decoder`."""

import dataclasses
from collections.abc import Callable

import numpy as np

from models.config import DecoderConfig
from models.experts import ExpertsConfig
from models.mxfp4 import BLOCK, BLOCK_BYTES

Path = tuple[str, ...]
ROWS = 64  # so many rows of a matrix and its transpose's columns stay in a core's cache


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One parameter of a block (or of the model) from tensors of the checkpoint."""

    sources: dict[str, tuple[int, ...]]  # name and shape as the checkpoint has them
    build: Callable[..., np.ndarray]  # from their values, to the parameter's shape


@dataclasses.dataclass(frozen=True)
class Prefix:
    """How a checkpoint's names begin."""

    model: str = "model."
    head: str = "lm_head.weight"


# Multimodal checkpoints have the language model beside an image encoder, under one of two names.
PREFIXES = (
    Prefix(),
    Prefix("language_model.model.", "language_model.lm_head.weight"),
    Prefix("model.language_model.", "lm_head.weight"),
)


def recipe_table(config: DecoderConfig, prefix: Prefix = PREFIXES[0]) -> dict[Path, Recipe]:
    """Every parameter's recipe; a block's names have `{layer}` where the number stands."""
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
    """A block's norms by our name and the checkpoint's.

    What Llama calls `post_attention_layernorm` stands before its MLP; in Gemma the name is true.
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
    """`GatedMLP`'s parameters."""
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
    """`Experts`' parameters; the experts themselves keep the published layout."""
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
    """A tensor as it is."""
    return Recipe({name: shape}, lambda x: x)


def linear(name: str, rows: int, columns: int) -> Recipe:
    """A matrix `[out, in]`, to `[in, out]`."""
    return Recipe({name: (rows, columns)}, transposed)


def transposed(x: np.ndarray) -> np.ndarray:
    """Moves the last axis to the front, as a copy, block by block.

    numpy's own copy of a transposed bfloat16 matrix runs at 0.2 GB/s, this at 2.
    """
    bits = np.ascontiguousarray(x).view(f"u{x.itemsize}").reshape(-1, x.shape[-1])
    out = np.empty(bits.shape[::-1], bits.dtype)
    for row in range(0, len(bits), ROWS):
        out[:, row : row + ROWS] = bits[row : row + ROWS].T
    return out.view(x.dtype).reshape(x.shape[-1], *x.shape[:-1])
