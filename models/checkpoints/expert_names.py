"""The names under which checkpoints have the tensors of a mixture of experts.

Plain experts come in three ways, whatever the architecture: a matrix for each expert under the
names of Qwen3's or of Mixtral's files, or one tensor for all experts, as transformers 5 holds them.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from models.checkpoints.recipe import Recipe, linear, one, transposed
from models.experts import ExpertsConfig
from models.mxfp4 import BLOCK, BLOCK_BYTES


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """Names, inside a layer, of the router and of the experts' matrices; `{expert}` is a number."""

    router: str
    gate: str
    up: str
    down: str

    @property
    def first(self) -> str:
        """A tensor that tells these names from others."""
        return self.down.format(expert=0)


_QWEN = "mlp.experts.{expert}."
_MIXTRAL = "block_sparse_moe.experts.{expert}."
SEPARATE = {
    "qwen3_moe": ExpertNames(
        "mlp.gate.weight",
        _QWEN + "gate_proj.weight",
        _QWEN + "up_proj.weight",
        _QWEN + "down_proj.weight",
    ),
    "mixtral": ExpertNames(
        "block_sparse_moe.gate.weight",
        _MIXTRAL + "w1.weight",
        _MIXTRAL + "w3.weight",
        _MIXTRAL + "w2.weight",
    ),
}
# Gate and up are one tensor, gate's rows first.
_BOTH = "mlp.experts.gate_up_proj"
FUSED = ExpertNames("mlp.gate.weight", _BOTH, _BOTH, "mlp.experts.down_proj")


def find_expert_names(architecture: str, layer: str, tensors: Mapping) -> ExpertNames:
    """The names that `tensors` has in `layer`; the architecture's published ones if none fit."""
    published = SEPARATE.get(architecture, FUSED)
    known = (published, *SEPARATE.values(), FUSED)
    return next((names for names in known if layer + names.first in tensors), published)


def expert_recipes(
    layer: str, names: ExpertNames, config: ExpertsConfig, hidden: int, inner: int
) -> dict[str, Recipe]:
    """Recipes of the parameters of `Experts` whose files have gate and up one after the other."""
    count, into, out_of = config.experts, (inner, hidden), (hidden, inner)
    if names == FUSED:
        gate_up = Recipe(
            {layer + names.gate: (count, 2 * inner, hidden)},
            lambda x: gate_up_columns(x[:, :inner], x[:, inner:]),
        )
        down = Recipe({layer + names.down: (count, *out_of)}, expert_by_expert)
    else:
        each = lambda name, shape: {layer + name.format(expert=e): shape for e in range(count)}
        gate_up = Recipe(
            each(names.gate, into) | each(names.up, into),
            lambda *x: gate_up_columns(x[:count], x[count:]),
        )
        down = Recipe(each(names.down, out_of), lambda *x: expert_by_expert(x))
    router = linear(layer + names.router, count, hidden)
    return {"router": router, "gate_up": gate_up, "down": down}


def gpt_oss_recipes(
    layer: str, config: ExpertsConfig, hidden: int, inner: int
) -> dict[str, Recipe]:
    """The same for gpt-oss, whose published layout of the experts is the module's."""
    count, router, experts = config.experts, layer + "mlp.router.", layer + "mlp.experts."
    table = {
        "router": linear(router + "weight", count, hidden),
        "router_bias": one(router + "bias", count),
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


def gate_up_columns(gates, ups) -> np.ndarray:
    """`[experts, hidden, 2 * inner]` with gate and up interleaved, of `[inner, hidden]` each."""
    rows = lambda gate, up: np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
    pairs = zip(gates, ups, strict=True)
    return expert_by_expert([rows(*pair) for pair in pairs])


def expert_by_expert(matrices) -> np.ndarray:
    """Transposes each expert's matrix."""
    return np.stack([transposed(x) for x in matrices])
