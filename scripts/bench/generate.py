"""Measures generation on this machine beside transformers and llama.cpp, where they are installed.

Every contender runs the same float32 weights, prompt lengths and token counts, in this process, one
after the other and then again. Beside the speeds stands the fraction of equal greedy tokens.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import platform
import statistics

import jax
import numpy as np
from rich.console import Console

import jaxkv
import models
from scripts.bench.cases import GRIDS
from scripts.bench.ceiling import least_read_seconds
from scripts.bench.peers.generators import Measure, llama_cpp_peer, ours, transformers_peer
from scripts.shared.command import print_json, run_command
from scripts.shared.options import check_least
from scripts.shared.tables import format_column, make_table

GRID = GRIDS["generate"]


@dataclasses.dataclass
class Args:
    """Prints tokens per second of prefill and decode, ours beside transformers and llama.cpp.

    Examples:
      generate.py --batch 1 --repeats 3
      generate.py --batch 1 8 --new-tokens 64 --no-peers
    """

    model: str = GRID.models[0]
    """'smollm2', a GGUF file, or a Hugging Face folder (no llama.cpp then)."""
    batch: tuple[int, ...] = GRID.batches
    """Batch sizes."""
    prompt_tokens: int = GRID.contexts[0]
    """Length of each prompt."""
    new_tokens: int = 128
    """Tokens generated for each."""
    repeats: int = 3
    """Measurements of each; the median counts, the spread is shown."""
    peers: bool = True
    """Measure transformers and llama.cpp where they are installed."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def contenders(args: Args, checkpoint, log: Console) -> dict[str, Measure]:
    """Everything that can be measured here, by name; says which can't."""
    found = {"jaxkv": ours(models.load(checkpoint, dtype="float32"))}
    if not args.peers:
        return found
    for package, name, make in (
        ("transformers", "transformers float32", transformers_peer),
        ("llama_cpp", f"llama.cpp {checkpoint.path.stem.rpartition('.')[2]}", llama_cpp_peer),
    ):
        if importlib.util.find_spec(package) is None:
            log.print(f"{package} is not installed: left out (pip install 'jaxkv[bench]')")
        elif package == "llama_cpp" and checkpoint.path.is_dir():
            log.print("llama.cpp reads GGUF files only: left out")
        else:
            log.print(f"loading {name}")
            found[name] = make(checkpoint)
    return found


def measure_batch(
    found: dict[str, Measure], batch: int, args: Args, vocab: int, log: Console
) -> list[dict]:
    """A row for each contender that can run such a batch, all on the same random prompts."""
    prompts = np.random.default_rng(0).integers(3, vocab, (batch, args.prompt_tokens)).tolist()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    first: dict[str, list[list[int]]] = {}
    for repeat in range(args.repeats + 1):  # the first warms up
        for name, measure in found.items():
            log.print(f"batch {batch}, {name}, {repeat}/{args.repeats}")
            with contextlib.suppress(NotImplementedError):
                tokens, prefill, decode = measure(prompts, args.new_tokens)
                first.setdefault(name, tokens)
                if repeat:
                    times[name].append((prefill, decode))
    return [
        _row(name, batch, runs, args, first[name], first["jaxkv"])
        for name, runs in times.items()
        if runs
    ]


def _row(name, batch, runs, args, tokens, reference) -> dict:
    prefill, decode = (statistics.median(x) for x in zip(*runs, strict=True))
    slowest, fastest = (pick(d for _, d in runs) for pick in (max, min))
    pairs = [(a, b) for x, y in zip(tokens, reference, strict=True) for a, b in zip(x, y)]  # noqa: B905
    return {
        "contender": name,
        "batch": batch,
        "prefill": batch * args.prompt_tokens / prefill,
        "decode": batch * (args.new_tokens - 1) / decode,
        "decode_spread": (slowest - fastest) / decode,
        "same_tokens": sum(a == b for a, b in pairs) / len(pairs),
    }


def show(rows: list[dict], title: str) -> None:
    """Prints the table."""
    number = functools.partial(format_column, rows)
    columns = {
        "contender": number("contender", ""),
        "batch": number("batch", "d"),
        "prefill\ntokens/s": number("prefill", ".0f"),
        "decode\ntokens/s": number("decode", ".1f"),
        "spread": number("decode_spread", ".0%"),
        "same\ntokens": number("same_tokens", ".0%"),
    }
    Console().print(make_table(title, columns))


def main(args: Args) -> int:
    """Measures, prints a table; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    check_least(args, "batch", "prompt_tokens", "repeats")
    check_least(args, "new_tokens", least=2)
    jaxkv.keep_compiled_programs()
    checkpoint = models.open_checkpoint(args.model, say=log.print)
    found = contenders(args, checkpoint, log)
    vocab = checkpoint.config["vocab_size"]
    rows = []
    for batch in args.batch:
        rows += measure_batch(found, batch, args, vocab, log)
    floor = least_read_seconds(models.load(checkpoint, dtype="float32"))
    show(rows, f"{args.prompt_tokens} prompt + {args.new_tokens} new tokens")
    print(
        f"floor of a decode step, reading float32 weights once: {floor * 1e3:.1f} ms = "
        f"{1 / floor:.1f} tokens/s at batch 1; {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )
    if args.json:
        print_json({"results": rows, "floor_ms": floor * 1e3})
    return 0


if __name__ == "__main__":
    run_command(main, Args)
