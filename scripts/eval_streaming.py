"""Perplexity of a real text through the windowed cache, with and without sink tokens.

Teacher-forced, chunk by chunk, through the same cache that generation uses. StreamingLLM
(arXiv:2309.17453): a window alone loses the first tokens, on which models park attention, and
perplexity breaks; a few of them kept beside the window mend it.
"""

import dataclasses
import json
import pydoc_data.topics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jaxkv
import models
from models.smollm2 import cache_folder
from scripts.shared.command import keep_compiled_programs, run_command

TOPIC = "\n\n".join(pydoc_data.topics.topics[name] for name in ("objects", "execmodel", "compound"))


@dataclasses.dataclass
class Args:
    """Prints perplexity relative to full attention for a window with and without sinks."""

    model: str = "smollm2"
    """'smollm2', a GGUF file, or a Hugging Face folder."""
    text: Path | None = None
    """File to score; default: chapters of the Python reference that ship with Python."""
    tokens: int = 2000
    """Tokens scored."""
    window: int = 256
    """Tokens a query sees."""
    sink_tokens: int = 4
    """First tokens kept beside the window."""
    chunk: int = 250
    """Tokens a step; the result does not depend on it."""
    json: bool = False
    """Last line of standard output: one JSON object."""


@jax.jit
def score(model, tokens, targets, cache):
    """Returns the log-probability of each target, `f32[tokens]`, and the cache."""
    count = jnp.full(1, tokens.shape[1], jnp.int32)
    hidden, cache = model(tokens, cache.prepare(count))
    logits = jax.nn.log_softmax(model.unembed(hidden), axis=-1)
    found = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[0, :, 0]
    return found, cache.commit(count)


def perplexity(
    model, tokens: np.ndarray, keep: jaxkv.Keep, chunk: int, progress=lambda: None
) -> float:
    """Perplexity of `tokens`, `i32[n]`, through a cache that keeps what `keep` says."""
    config = jaxkv.CacheConfig(
        layers=model.layer_specs(keep),
        batch=1,
        max_tokens=len(tokens),
        max_new_tokens=chunk,
    )
    cache, total = jaxkv.KVCache.create(config), 0.0
    for start in range(0, len(tokens) - 1, chunk):
        stop = min(start + chunk, len(tokens) - 1)
        piece, target = tokens[None, start:stop], tokens[None, start + 1 : stop + 1]
        found, cache = score(model, jnp.asarray(piece), jnp.asarray(target), cache)
        total += float(jnp.sum(found))
        progress()
    return float(np.exp(-total / (len(tokens) - 1)))


def main(args: Args) -> int:
    """Scores four caches, prints a table; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    keep_compiled_programs(cache_folder() / "xla")
    checkpoint = models.open_checkpoint(args.model, say=log.print)
    tokenizer = checkpoint.load_tokenizer()
    text = TOPIC if args.text is None else args.text.read_text(encoding="utf-8")
    tokens = np.asarray(tokenizer.encode(text)[: args.tokens], np.int32)
    if len(tokens) < args.tokens:
        raise ValueError(f"--text has {len(tokens)} tokens, fewer than --tokens {args.tokens}.")
    model = models.load(checkpoint, scan=True)
    kept = jaxkv.Keep(window=args.window, sink_tokens=args.sink_tokens)
    caches = {
        "full attention": jaxkv.Keep(),
        f"window {args.window}": jaxkv.Keep(window=args.window),
        f"window {args.window}, {args.sink_tokens} sinks": kept,
        f"window {args.window}, {args.sink_tokens} sinks, cache positions": dataclasses.replace(
            kept, sink_positions="cache"
        ),
    }
    steps = len(caches) * -(-(len(tokens) - 1) // args.chunk)
    found = {}
    with Progress(console=log, transient=True, disable=not log.is_terminal) as bar:
        task = bar.add_task("scoring", total=steps)
        for name, keep in caches.items():
            bar.update(task, description=name)
            found[name] = perplexity(model, tokens, keep, args.chunk, lambda: bar.advance(task))
    full = found["full attention"]
    table = Table("cache", "perplexity", "ratio", title=f"{len(tokens)} tokens of text")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}", f"{value / full:.3f}")
    Console(file=sys.stdout).print(table)
    if args.json:
        print(json.dumps({"perplexity": found, "ratio": {k: v / full for k, v in found.items()}}))
    return 0


if __name__ == "__main__":
    run_command(main, Args)
