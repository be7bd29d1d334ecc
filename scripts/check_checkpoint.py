"""Compares a checkpoint's logits with stored ones: one prefill, and chunks plus cached decode.

DIR has config.json, model.safetensors and io.npz with `input_ids i32[batch, tokens]` and
`logits f32[batch, tokens, vocab]`. Runs in float32; exit 1 when a difference exceeds --tol.
"""

import dataclasses
import zipfile
import zlib
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import models
from jaxkv import CacheConfig, Keep, KVCache
from models.errors import one_line
from scripts.shared.command import print_json, run_command

UNREADABLE = (ValueError, TypeError, KeyError, OSError, EOFError)  # np.load can raise these


@dataclasses.dataclass
class Args:
    """Compares a checkpoint's logits with the ones stored beside it (io.npz).

    Examples:
      check_checkpoint.py path/to/folder
      check_checkpoint.py path/to/folder --tol 1e-4 --scan
    """

    dir: Annotated[Path, tyro.conf.Positional]
    """Folder with config.json, model.safetensors and io.npz."""
    tol: float = 1e-3
    """Largest absolute difference that passes."""
    json: bool = False
    """Print one JSON object alone; without this option it is the last line."""
    page_size: int = 16
    """Tokens per cache page."""
    scan: bool = False
    """Scan over repeats of the layer pattern in place of unrolling all layers."""


@jax.jit
def step(model, tokens, cache):
    """Runs `tokens`, all of them real; returns logits and the cache."""
    count = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    hidden, cache = model(tokens, cache.prepare(count))
    return model.unembed(hidden), cache.commit(count)


def uneven_chunks(tokens: int) -> list[int]:
    """Two thirds of the tokens in chunks of 1, 2/5, ... then the rest one by one."""
    prefill = max(1, tokens * 2 // 3)
    first, second = 1, (prefill - 1) * 2 // 5
    chunks = [n for n in (first, second, prefill - first - second) if n]
    return chunks + [1] * (tokens - prefill)


def read_oracle(path: Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The stored `input_ids` and `logits`; CheckpointError if they can't be this model's."""
    if not path.is_file():
        raise models.CheckpointError(f"{path}: no such file; it holds input_ids and logits.")
    try:
        with path.open("rb") as file, np.load(file) as stored:
            tokens, logits = stored["input_ids"], stored["logits"]
    except (*UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        raise models.CheckpointError(f"{path}: cannot be read: {one_line(error)}.") from None
    if tokens.ndim != 2 or tokens.size == 0 or logits.shape != (*tokens.shape, vocab_size):
        raise models.CheckpointError(
            f"{path}: logits {logits.shape} must be input_ids {tokens.shape} and {vocab_size=}."
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise models.CheckpointError(f"{path}: input_ids must be tokens below {vocab_size=}.")
    return tokens.astype(np.int32), logits


def largest_difference(model, tokens: np.ndarray, logits: np.ndarray, chunks: list[int], args):
    """Feeds `tokens` through a fresh cache in `chunks`; returns the largest logit difference."""
    batch, length = tokens.shape
    config = CacheConfig(
        layers=model.layer_specs(Keep(dtype="float32")),
        batch=batch,
        max_tokens=length,
        max_new_tokens=max(chunks),
        page_size=args.page_size,
    )
    cache, worst, start = KVCache.create(config), 0.0, 0
    for count in chunks:
        got, cache = step(model, jnp.asarray(tokens[:, start : start + count]), cache)
        difference = np.abs(np.asarray(got) - logits[:, start : start + count]).max()
        worst = max(worst, float(difference))  # max(0.0, nan) is 0.0
        if np.isnan(difference):
            return float("nan")
        start += count
    return worst


def main(args: Args) -> int:
    """Prints both differences; returns the exit code."""
    jax.config.update("jax_default_matmul_precision", "highest")
    model = models.load(args.dir, dtype="float32", scan=args.scan)
    tokens, logits = read_oracle(args.dir / "io.npz", model.config.vocab_size)
    length = tokens.shape[1]
    result = {
        "prefill_max_abs_diff": largest_difference(model, tokens, logits, [length], args),
        "decode_max_abs_diff": largest_difference(
            model, tokens, logits, uneven_chunks(length), args
        ),
    }
    passes = all(value <= args.tol for value in result.values())  # NaN fails
    if not args.json:
        for name, value in result.items():
            print(f"{name:22} {value:.2e}")
        print(f"{'ok' if passes else 'FAILED'}: tolerance {args.tol:g}")
    print_json(result)
    return 0 if passes else 1


if __name__ == "__main__":
    run_command(main, Args)
