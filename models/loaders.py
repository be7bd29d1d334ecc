"""Fills a `Decoder` from a checkpoint, tensor by tensor, without holding the model twice."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import gemma, gpt_oss, llama, mistral, qwen3
from models.checkpoints import Checkpoint, CheckpointError
from models.config import DecoderConfig
from models.decoder import Decoder
from models.recipes import PREFIXES, Path, Prefix, Recipe, recipe_table

ARCHITECTURES: dict[str, Callable[[dict], DecoderConfig]] = {
    "llama": llama.decoder_config,
    "mistral": mistral.decoder_config,
    "qwen3": qwen3.decoder_config,
    "gemma2": gemma.gemma2_config,
    "gemma3_text": gemma.gemma3_config,
    "gemma3": gemma.gemma3_multimodal_config,
    "gpt_oss": gpt_oss.decoder_config,
}
SKIPPED = {"gemma3": gemma.IMAGE_TENSORS}  # how names begin that are no part of the decoder
DERIVED = "rotary_emb.inv_freq"  # how names of buffers end that old exports carry

Progress = Callable[[int, int], None]  # bytes of the file read, of how many


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
    """Builds the model and fills every parameter.

    Host memory holds one tensor at a time, on a CPU the model as well: files are mapped, a read
    tensor's pages are given back, and a stack of layers is filled in place, layer by layer.

    Raises:
      CheckpointError: an unknown architecture; a missing, extra or misshaped tensor, by name.
    """
    config = architecture_config(checkpoint.config)
    recipes = recipe_table(config, find_prefix(checkpoint))
    check_names(checkpoint, recipes, config.layers)
    model = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), scan=scan, dtype=dtype))
    graph, state = nnx.split(model)
    read = _Reader(checkpoint, [name for name, _ in tensor_names(recipes, config.layers)], progress)
    filled = []
    for path, parameter in nnx.to_flat_state(state):
        own, layers, stacked = _place(path, model)
        value = _fill(read, recipes[own], parameter.get_value(), layers, stacked=stacked)
        filled.append((path, parameter.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def find_prefix(checkpoint: Checkpoint) -> Prefix:
    """How the names of this checkpoint begin; the usual way if it has no embedding at all."""
    embedding = lambda prefix: prefix.model + "embed_tokens.weight"
    return next((p for p in PREFIXES if embedding(p) in checkpoint.tensors), PREFIXES[0])


def tensor_names(recipes: dict[Path, Recipe], layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the recipes read, with its shape."""
    for recipe in recipes.values():
        for name, shape in recipe.sources.items():
            for layer in range(layers) if "{layer}" in name else (0,):
                yield name.format(layer=layer), shape


def check_names(checkpoint: Checkpoint, recipes: dict[Path, Recipe], layers: int) -> None:
    """Every expected tensor is there with its shape, and nothing else is.

    Raises:
      CheckpointError: the first that is missing, misshaped or left over, by name.
    """
    expected = dict(tensor_names(recipes, layers))
    for name, shape in expected.items():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: has no tensor {name!r}.")
        found = tuple(checkpoint.shape(name))
        if found != shape:
            raise CheckpointError(f"{checkpoint.path}: {name!r} is {found} and must be {shape}.")
    # A tied head is stored twice by some.
    spare = set() if ("head",) in recipes else {prefix.head for prefix in PREFIXES}
    skipped = SKIPPED.get(checkpoint.config["model_type"], ())
    for name in checkpoint.tensors.keys() - expected.keys() - spare:
        if not name.startswith(skipped) and not name.endswith(DERIVED):
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r} belongs to no parameter.")


class _Reader:
    """Reads tensors and counts their bytes."""

    def __init__(self, checkpoint: Checkpoint, names: list[str], progress: Progress | None):
        self.checkpoint, self.progress = checkpoint, progress
        self.done, self.total = 0, sum(checkpoint.tensors[name].nbytes for name in names)

    def build(self, recipe: Recipe, layer: int, dtype: np.dtype) -> np.ndarray:
        """One layer's parameter; it may lie in the mapped file."""
        names = [name.format(layer=layer) for name in recipe.sources]
        values = [self.checkpoint.read(name) for name in names]
        for name, value in zip(names, values, strict=True):
            if (value.dtype.kind in "iub") != (dtype.kind in "iub"):
                raise CheckpointError(
                    f"{self.checkpoint.path}: {name!r} is {value.dtype} and can't become {dtype}."
                )
        return np.ascontiguousarray(recipe.build(*values), dtype)

    def release(self, recipe: Recipe, layer: int) -> None:
        """Says that the values which `build` returned last are no longer needed."""
        for name in recipe.sources:
            tensor = self.checkpoint.tensors[name.format(layer=layer)]
            tensor.release()
            self.done += tensor.nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)


def _place(path: tuple, model: Decoder) -> tuple[Path, range, bool]:
    """A parameter's path within its block, the layers it holds, and whether they are stacked."""
    period, scanned = len(model.pattern), model.repeats * len(model.pattern)
    if path[0] == "pattern":
        return path[2:], range(path[1], scanned, period), True
    if path[0] == "layers":
        return path[2:], range(scanned + path[1], scanned + path[1] + 1), False
    return path, range(1), False  # the model's own: its names have no layer


def _fill(
    read: _Reader, recipe: Recipe, abstract: jax.ShapeDtypeStruct, layers: range, *, stacked: bool
) -> jax.Array:
    """Reads one parameter."""
    out = jnp.zeros(abstract.shape, abstract.dtype) if stacked else None
    for place, layer in enumerate(layers):
        value = read.build(recipe, layer, abstract.dtype)
        out = jnp.array(value) if out is None else _put(out, value, np.int32(place))
        out.block_until_ready()  # or host copies of many layers wait for the device
        read.release(recipe, layer)
    assert out is not None
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, value: jax.Array, place: jax.Array) -> jax.Array:
    """`stack` with `value` at `place` of its first axis; `stack` is donated."""
    return jax.lax.dynamic_update_index_in_dim(stack, value, place, axis=0)
