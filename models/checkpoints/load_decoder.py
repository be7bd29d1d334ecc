"""Fills a `Decoder` from a checkpoint, tensor by tensor, without holding the model twice."""

import functools
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.abstract_decoder import abstract_decoder
from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.recipe import Recipe
from models.checkpoints.tensor_names import (
    ParameterPath,
    check_names,
    find_naming,
    recipe_table,
    tensor_names,
)
from models.checkpoints.tied_head import as_stored
from models.decoder import Decoder
from models.errors import CheckpointError, clear_errors
from models.families.architectures import architecture_config

Progress = Callable[[int, int], None]  # bytes of weights read so far, bytes there are in all


def load_decoder(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    scan: bool,
    progress: Progress | None = None,
) -> Decoder:
    """Builds the model and fills every parameter.

    Beside the model itself, memory of the host holds about one tensor: files are mapped, the
    memory of a tensor that has been read is given back, and a stack of layers is filled in place,
    layer by layer.

    Raises:
      CheckpointError: an unknown architecture, or a tensor that is missing, left over, or of the
        wrong shape or type. The message names it.
    """
    with clear_errors(checkpoint.path):
        config = architecture_config(checkpoint.config)
        naming = find_naming(checkpoint, config)
        config = as_stored(config, checkpoint, naming)
        recipes = recipe_table(config, naming)
        check_names(checkpoint, recipes, config.layers)
    model = abstract_decoder(config, scan=scan, dtype=dtype)
    graph, state = nnx.split(model)
    _check_memory(checkpoint, state)
    read = _Reader(checkpoint, [name for name, _ in tensor_names(recipes, config.layers)], progress)
    filled = []
    for path, parameter in nnx.to_flat_state(state):
        own, layers, stacked = _locate(path, model)
        value = _fill(read, recipes[own], parameter.get_value(), layers, stacked=stacked)
        filled.append((path, parameter.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _check_memory(checkpoint: Checkpoint, state: nnx.State) -> None:
    """Checks that a CPU's memory can hold the parameters, before any is allocated.

    A sparse file can promise more than a disk holds, and a system that runs out of memory may end
    the process without a word. A GPU refuses by itself.
    """
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    if jax.default_backend() != "cpu" or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise CheckpointError(
            f"{checkpoint.path}: the model needs {needed / 2**30:.1f} GiB of memory, and this "
            f"machine has {present / 2**30:.1f} GiB."
        )


class _Reader:
    """Reads tensors and counts their bytes."""

    def __init__(self, checkpoint: Checkpoint, names: list[str], progress: Progress | None):
        self.checkpoint, self.progress = checkpoint, progress
        self.done, self.total = 0, sum(checkpoint.tensors[name].nbytes for name in names)

    def build(self, recipe: Recipe, layer: int, dtype: np.dtype) -> np.ndarray:
        """One layer's parameter. The result may be a view of the mapped file."""
        names = [name.format(layer=layer) for name in recipe.sources]
        values = [self.checkpoint.read(name) for name in names]
        for name, value in zip(names, values, strict=True):
            if (value.dtype.kind in "iub") != (dtype.kind in "iub"):
                raise CheckpointError(
                    f"{self.checkpoint.path}: {name!r} is {value.dtype} and can't become {dtype}."
                )
        return np.ascontiguousarray(recipe.build(*values), dtype)

    def release(self, recipe: Recipe, layer: int) -> None:
        """Gives back the memory of the tensors that `build` read, and reports progress."""
        for name in recipe.sources:
            tensor = self.checkpoint.tensors[name.format(layer=layer)]
            tensor.release()
            self.done += tensor.nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)


def _locate(path: tuple, model: Decoder) -> tuple[ParameterPath, range, bool]:
    """A parameter's path inside its block, the layers it holds, and whether they are stacked.

    A parameter outside the blocks (embedding, head, last norm) counts as one layer; its tensors'
    names have no layer number.
    """
    period, scanned = len(model.pattern), model.repeats * len(model.pattern)
    if path[0] == "pattern":
        return path[2:], range(path[1], scanned, period), True
    if path[0] == "layers":
        return path[2:], range(scanned + path[1], scanned + path[1] + 1), False
    return path, range(1), False


def _fill(
    read: _Reader, recipe: Recipe, abstract: jax.ShapeDtypeStruct, layers: range, *, stacked: bool
) -> jax.Array:
    """Reads one parameter, for all `layers` that it holds."""
    out = jnp.zeros(abstract.shape, abstract.dtype) if stacked else None
    for place, layer in enumerate(layers):
        value = read.build(recipe, layer, abstract.dtype)
        out = _to_device(value) if out is None else _put(out, value, np.int32(place))
        out.block_until_ready()  # otherwise host copies of many layers queue up for the device
        read.release(recipe, layer)
    assert out is not None
    return out


def _to_device(value: np.ndarray) -> jax.Array:
    """The values on the device, which on a CPU may be the array itself.

    Views of a mapped file, which are read-only, are copied: its memory is given back.
    """
    return jnp.asarray(value if value.flags.writeable else value.copy())


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, value: jax.Array, place: jax.Array) -> jax.Array:
    """`stack` with `value` at `place` of its first axis; `stack` is donated."""
    return jax.lax.dynamic_update_index_in_dim(stack, value, place, axis=0)
