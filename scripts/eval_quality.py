"""What a quantized cache costs on a real text: KL divergence and perplexity against the exact one.

Every codec's cache reads the text beside the exact one, see `scripts/shared/scoring.py`.
"""

import dataclasses
import functools
import platform
import sys
from pathlib import Path
from typing import Literal

import jax
from rich.console import Console

import jaxkv
import models
from jaxkv.codecs import KVCodec, codec_names
from models.families.architectures import architecture_config
from scripts.shared.command import print_json, run_command
from scripts.shared.keep import CodecsOptions
from scripts.shared.options import check_least
from scripts.shared.plots import check_plot, has_matplotlib, plot_quality
from scripts.shared.progress import Reporter
from scripts.shared.scoring import compare_caches, stored_bits, summarize
from scripts.shared.tables import format_column, make_table
from scripts.shared.texts import first_tokens, read_text

PLOT = "eval_quality.png"


@dataclasses.dataclass
class Args:
    """Measures KV codecs on a text: KL, perplexity and top-1 agreement against the exact cache.

    Without --codec it measures all codecs but 'exact', which the others are compared with.

    Examples:
      eval_quality.py
      eval_quality.py --codec 4bit_nc --codec tq4 --tokens 4096 --json
      eval_quality.py --codec 3bit_nc --recent-pages 2 --sink-tokens 4 --text book.txt
    """

    model: str = "smollm2"
    """'smollm2' (93 MB, fetched once), a GGUF file, or a Hugging Face folder."""
    keep: CodecsOptions = CodecsOptions()
    text: Path | None = None
    """File to score; default: chapters of the Python reference that ship with Python."""
    tokens: int = 2048
    """Tokens read; all but the first are scored."""
    page_size: int = 64
    """Tokens per cache page."""
    chunk: int = 256
    """Tokens per step; the result does not depend on it."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and exact pages; default: float32 on a CPU, bfloat16 elsewhere."""
    plot: str = PLOT
    """File for the plot of KL against bits per value; '' or 'none' for no plot."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def print_results(
    console: Console, results: list[dict], codecs: dict[str, KVCodec], title: str
) -> None:
    """The table by codec, in the order asked for."""
    number = functools.partial(format_column, results)
    kept = [codecs[row["codec"]] for row in results]
    columns = {
        "codec": number("codec", ""),
        "bits per\nvalue": number("bits_per_value", ".2f"),
        "exact\npages": [str(codec.recent_pages) if codec.lossy else "all" for codec in kept],
        "exact\nsinks": [str(codec.sink_tokens) if codec.lossy else "all" for codec in kept],
        "KL": number("kl", ".5f"),
        "KL\np99": number("kl_p99", ".4f"),
        "PPL\nratio": number("ppl_ratio", ".4f"),
        "top-1": number("top1", ".4f"),
    }
    console.print(make_table(title, columns))


def plot_path(plot: str) -> Path | None:
    """The file to plot to, or None for no plot; ValueError if there can be none.

    Without matplotlib the default file is skipped, and only a file that was asked for is an error.
    """
    if plot.lower() in ("", "none") or (plot == PLOT and not has_matplotlib()):
        return None
    return check_plot(plot)


def check_context(args: Args, model: models.DecoderConfig) -> None:
    """Raises ValueError if the text is longer than what the model was trained on."""
    longest = model.max_position
    if args.keep.window is None and longest is not None and args.tokens > longest:
        raise ValueError(
            f"--tokens {args.tokens} must be at most the model's trained context, {longest} "
            "(or give a --window)."
        )


def evaluated_config(
    model: models.DecoderConfig, codec: str | KVCodec, dtype: str, args: Args
) -> jaxkv.CacheConfig:
    """The cache that holds the text under `codec`; the exact one has the same window and sinks."""
    return jaxkv.CacheConfig(
        layers=model.layer_specs(args.keep.keep(codec, dtype=dtype)),
        batch=1,
        max_tokens=args.tokens,
        max_new_tokens=min(args.chunk, args.tokens - 1),
        page_size=args.page_size,
    ).checked()


def main(args: Args) -> int:
    """Scores every codec, prints a table, saves a plot; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    say = lambda line: log.print(line, style="dim", soft_wrap=True)
    names = args.keep.codec or tuple(name for name in codec_names() if name != "exact")
    codecs = args.keep.choose(names)
    check_least(args, "tokens", least=2)
    check_least(args, "chunk")
    plot = plot_path(args.plot)
    text = read_text(args.text)
    checkpoint = models.open_checkpoint(args.model, say=say)
    architecture = architecture_config(checkpoint.config)
    check_context(args, architecture)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    configs = {
        name: evaluated_config(architecture, codec, dtype, args) for name, codec in codecs.items()
    }
    exact = evaluated_config(architecture, "exact", dtype, args)
    tokens = first_tokens(text, checkpoint.load_tokenizer(), args.tokens)
    if plot is None and args.plot == PLOT:
        say("no plot: it needs matplotlib (pip install matplotlib)")
    say(f"scoring {text.source}, sha256 {text.sha256[:16]}…")
    jaxkv.keep_compiled_programs()
    # A scan is slower on a CPU, and compiles in a third of the time, which is most of a run.
    alike = all(len(config.groups) == 1 for config in (exact, *configs.values()))
    with Reporter(log, 1 + len(codecs), len(tokens) - 1) as reporter:
        model = models.load(checkpoint, dtype=args.dtype, scan=alike)
        scores, caches = compare_caches(model, tokens, exact, configs, begin=reporter.begin)
    results = [summarize(name, scores[name], stored_bits(caches[name])) for name in codecs]
    title = f"{args.model}, {len(tokens)} tokens of text, {dtype}, page size {args.page_size}"
    print_results(Console(file=sys.stdout, highlight=False), results, codecs, title)
    if plot is not None:
        recipes = {name for name, codec in codecs.items() if codec.key_mean is not None}
        plot_quality(plot, results, recipes, title)
        say(f"plot saved as {plot}")
    if args.json:
        about = {
            "model": args.model,
            "text": text.source,
            "text_sha256": text.sha256,
            "python": platform.python_version(),
            "tokens": len(tokens),
            "page_size": args.page_size,
            "dtype": dtype,
            "window": args.keep.window,
            "keep_first": args.keep.keep_first,
            "keep_last": args.keep.keep_last,
            "recent_pages": {name: codec.recent_pages for name, codec in codecs.items()},
            "sink_tokens": {name: codec.sink_tokens for name, codec in codecs.items()},
        }
        print_json({**about, "results": results})
    return 0


if __name__ == "__main__":
    run_command(main, Args)
