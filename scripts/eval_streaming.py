"""Perplexity of a real text through the windowed cache, with and without sink tokens.

StreamingLLM (arXiv:2309.17453): a window alone loses the first tokens, on which models park
attention, and perplexity breaks; a few of them kept beside the window mend it.
"""

import dataclasses
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import jaxkv
import models
from scripts.shared.command import print_json, run_command
from scripts.shared.keep import WindowOptions
from scripts.shared.options import check_least
from scripts.shared.scoring import perplexity
from scripts.shared.tables import make_table
from scripts.shared.texts import first_tokens, read_text

CHAPTERS = ("objects", "execmodel", "compound")


@dataclasses.dataclass
class Args:
    """Prints perplexity relative to full attention for a window with and without sinks.

    Examples:
      eval_streaming.py
      eval_streaming.py --window 512 --sink-tokens 4 --text book.txt --tokens 8000
    """

    model: str = "smollm2"
    """'smollm2' (93 MB, fetched once), a GGUF file, or a Hugging Face folder."""
    keep: WindowOptions = WindowOptions(window=256, sink_tokens=4)
    text: Path | None = None
    """File to score; default: chapters of the Python reference that ship with Python."""
    tokens: int = 2000
    """Tokens read; all but the first are scored."""
    chunk: int = 250
    """Tokens per step; the result does not depend on it."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def caches_to_compare(keep: WindowOptions) -> dict[str, jaxkv.Keep]:
    """Full attention, the window alone, and the window with sinks at both kinds of positions."""
    kept, window = keep.keep(), f"window {keep.window}"
    return {
        "full attention": jaxkv.Keep(),
        window: dataclasses.replace(kept, sink_tokens=0),
        f"{window}, {kept.sink_tokens} sinks": kept,
        f"{window}, {kept.sink_tokens} sinks, cache positions": dataclasses.replace(
            kept, sink_positions="cache"
        ),
    }


def main(args: Args) -> int:
    """Scores four caches, prints a table; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    check_least(args, "tokens", least=2)
    check_least(args, "chunk")
    text = read_text(args.text, CHAPTERS)
    jaxkv.keep_compiled_programs()
    checkpoint = models.open_checkpoint(args.model, say=log.print)
    tokens = first_tokens(text, checkpoint.load_tokenizer(), args.tokens)
    model = models.load(checkpoint, scan=True)
    configs = {
        name: jaxkv.CacheConfig(
            layers=model.layer_specs(keep),
            batch=1,
            max_tokens=len(tokens),
            max_new_tokens=args.chunk,
        ).checked()
        for name, keep in caches_to_compare(args.keep).items()
    }
    steps = len(configs) * -(-(len(tokens) - 1) // args.chunk)
    found = {}
    with Progress(console=log, transient=True, disable=not log.is_terminal) as bar:
        task = bar.add_task("scoring", total=steps)
        for name, config in configs.items():
            bar.update(task, description=name)
            found[name] = perplexity(model, tokens, config, done=lambda: bar.advance(task))
    ratio = {name: value / found["full attention"] for name, value in found.items()}
    columns = {
        "cache": list(found),
        "perplexity": [f"{value:.3f}" for value in found.values()],
        "ratio": [f"{value:.3f}" for value in ratio.values()],
    }
    Console(file=sys.stdout).print(make_table(f"{len(tokens)} tokens of text", columns))
    if args.json:
        print_json({"perplexity": found, "ratio": ratio})
    return 0


if __name__ == "__main__":
    run_command(main, Args)
