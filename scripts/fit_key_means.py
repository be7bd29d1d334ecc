"""Fits the per-channel key means that codecs with a static mean remove, and saves them."""

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console

import jaxkv
import models
from scripts.shared.command import run_command
from scripts.shared.options import check_least
from scripts.shared.progress import working
from scripts.shared.texts import read_text


@dataclasses.dataclass
class Args:
    """Averages a model's keys over a text and saves `layer_0`, `layer_1`, ... as an .npz file.

    Examples:
      fit_key_means.py --model smollm2 --text book.txt --out smollm2.key_means.npz
    """

    out: Path
    """File to write; keep it beside the model."""
    model: str = "smollm2"
    """'smollm2', a GGUF file, or a Hugging Face folder."""
    text: Path | None = None
    """Text to average over, not the one to score later; default: the Python reference."""
    tokens: int = 2048
    """Most tokens of it."""


def main(args: Args) -> int:
    """Fits and saves; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    if args.out.suffix != ".npz" or not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: must be an .npz file in a folder that exists.")
    check_least(args, "tokens", least=2)
    text = read_text(args.text)
    checkpoint = models.open_checkpoint(args.model, say=log.print)
    tokens = checkpoint.load_tokenizer().encode(text.text)[: args.tokens]
    with working(log, f"averaging keys over {len(tokens)} tokens"):
        means = jaxkv.fit_key_means(models.load(checkpoint, scan=True), tokens)
    partial = args.out.with_name(args.out.name + ".part")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **{f"layer_{i}": m for i, m in enumerate(means)})
    partial.replace(args.out)
    log.print(f"{len(means)} layers' means of {len(tokens)} tokens saved as {args.out}")
    return 0


if __name__ == "__main__":
    run_command(main, Args)
