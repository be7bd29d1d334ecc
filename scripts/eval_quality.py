"""What a quantized cache costs on texts and retrieval tasks, compared with exact pages.

Every codec's cache reads each document beside the exact one, see `scripts/shared/scoring.py`.
"""

import dataclasses
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import tyro
from rich.console import Console

import jaxkv
import models
from jaxkv.codecs import KVCodec, codec_names
from models.families.architectures import architecture_config
from scripts.shared.command import print_json, run_command
from scripts.shared.documents import Source, cut_text
from scripts.shared.keep import CodecsOptions
from scripts.shared.options import Names, check_choice, check_least
from scripts.shared.plots import check_plot, has_matplotlib, plot_quality
from scripts.shared.progress import Reporter
from scripts.shared.quality_tables import quality_tables
from scripts.shared.scoring import EXACT, Reading, read_document
from scripts.shared.summaries import summarize
from scripts.shared.tasks import TASKS, make_task
from scripts.shared.texts import PYTHON, Text, read_texts

PLOT = "eval_quality.png"
Lengths = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N...")]
Tasks = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")]


@dataclasses.dataclass
class Args:
    """Measures KV codecs against exact pages: KL, perplexity and agreement on texts, accuracy on
    retrieval tasks; several models, texts, tasks and lengths in one run.

    Without --codec it measures all codecs. Numbers come with their standard errors over documents.

    Examples:
      eval_quality.py
      eval_quality.py --tasks all --lengths 512 1024 2048 --codec 4bit_nc --codec tq4
      eval_quality.py --text python --text book.txt --model smollm2 --model ./my-model --json
      eval_quality.py --codec 3bit_nc --recent-pages 2 --sink-tokens 4 --plot quality.svg
    """

    model: Names = ()
    """'smollm2' (93 MB, fetched once; the default), a GGUF file, or a Hugging Face folder; repeat
    for more."""
    keep: CodecsOptions = CodecsOptions()
    text: Names = ()
    """File to score; repeat for several. 'python': chapters of the Python reference that ship with
    Python, which is the default without --tasks."""
    tasks: Tasks = ()
    """Retrieval tasks: needle (a number of 5 digits), pairs (the value of one of 8 keys), hops
    (each link of one of 4 chains), or all."""
    lengths: Lengths = (2048,)
    """Tokens in the cache at the end of each document."""
    documents: int = 4
    """Documents of each text and length, one behind the other."""
    instances: int = 20
    """Instances of each task and length; the same ones for every codec and run."""
    page_size: int = 64
    """Tokens per cache page."""
    chunk: int = 256
    """Tokens per step; the result does not depend on it, but for rounding."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and exact pages; default: float32 on a CPU, bfloat16 elsewhere."""
    plot: str = PLOT
    """File for the plot of KL and accuracy against bits per value; '' or 'none' for no plot."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


class Job(NamedTuple):
    """All that is measured with one model, checked before any weights are read."""

    name: str
    checkpoint: models.Checkpoint
    sources: list[Source]
    exact: jaxkv.CacheConfig
    coded: dict[str, jaxkv.CacheConfig]


def plot_path(plot: str) -> Path | None:
    """The file to plot to, or None for no plot; ValueError if there can be none.

    Without matplotlib the default file is skipped, and only a file that was asked for is an error.
    """
    if plot.lower() in ("", "none") or (plot == PLOT and not has_matplotlib()):
        return None
    return check_plot(plot)


def check_context(args: Args, model: models.DecoderConfig) -> None:
    """Raises ValueError if a document is longer than what the model was trained on."""
    longest, length = model.max_position, max(args.lengths)
    if args.keep.window is None and longest is not None and length > longest:
        raise ValueError(
            f"--lengths {length} must be at most the model's trained context, {longest} "
            "(or give a --window)."
        )


def evaluated_config(
    model: models.DecoderConfig, codec: str | KVCodec, dtype: str, args: Args
) -> jaxkv.CacheConfig:
    """The cache that holds a document under `codec`; the exact one has the same window and sinks.

    It has room for the longest document, so that all lengths share compiled programs.
    """
    return jaxkv.CacheConfig(
        layers=model.layer_specs(args.keep.keep(codec, dtype=dtype)),
        batch=1,
        max_tokens=max(args.lengths),
        max_new_tokens=min(args.chunk, max(args.lengths)),
        page_size=args.page_size,
    ).checked()


def check_args(args: Args) -> tuple[dict[str, KVCodec], tuple[str, ...]]:
    """The codecs beside the exact one, and the names of the tasks; ValueError for a bad option."""
    names = args.keep.codec or codec_names()
    codecs = args.keep.choose(names)
    check_least(args, "lengths", least=2)
    check_least(args, "chunk", "documents", "instances")
    if not args.lengths:
        raise ValueError("--lengths needs a value.")
    for task in args.tasks:
        check_choice("tasks", task, [*TASKS, "all"])
    tasks = tuple(TASKS) if "all" in args.tasks else tuple(dict.fromkeys(args.tasks))
    return {name: codec for name, codec in codecs.items() if name != EXACT}, tasks


def prepare(
    args: Args,
    name: str,
    codecs: dict[str, KVCodec],
    texts: Sequence[Text],
    tasks: Sequence[str],
    dtype: str,
    say,
) -> Job:
    """Opens a checkpoint, makes its documents and configures its caches."""
    checkpoint = models.open_checkpoint(name, say=say)
    architecture = architecture_config(checkpoint.config)
    check_context(args, architecture)
    configure = lambda codec: evaluated_config(architecture, codec, dtype, args)
    exact = configure(EXACT)
    coded = {codec: configure(value) for codec, value in codecs.items()}
    tokenizer = checkpoint.load_tokenizer()
    lengths = tuple(dict.fromkeys(args.lengths))
    sources = [
        cut_text(text, tokenizer, length, args.documents) for text in texts for length in lengths
    ]
    sources += [
        make_task(task, tokenizer, length, args.instances) for task in tasks for length in lengths
    ]
    return Job(name, checkpoint, sources, exact, coded)


def measure(job: Job, dtype: str | None, log: Console) -> list[dict]:
    """Reads all documents with one model: a row per source and codec, exact pages first."""
    caches = (job.exact, *job.coded.values())
    # A scan is slower on a CPU, and compiles in a third of the time, which is most of a run.
    alike = all(len(config.groups) == 1 for config in caches)
    tokens = sum(document.length for source in job.sources for document in source.documents)
    rows = []
    with Reporter(log, len(caches), tokens) as reporter:
        model = models.load(job.checkpoint, dtype=dtype, scan=alike)
        for source in job.sources:
            readings: dict[str, list[Reading]] = {}
            for document in source.documents:
                found = read_document(model, document, job.exact, job.coded, begin=reporter.begin)
                for codec, reading in found.items():
                    readings.setdefault(codec, []).append(reading)
            rows += [summarize(job.name, source, codec, found) for codec, found in readings.items()]
    return rows


def describe(args: Args, codecs: dict[str, KVCodec], texts: Sequence[Text], dtype: str) -> dict:
    """What was measured and with what, for the JSON."""
    return {
        "models": list(args.model),
        "texts": {text.name: {"source": text.source, "sha256": text.sha256} for text in texts},
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "dtype": dtype,
        "page_size": args.page_size,
        "window": args.keep.window,
        "keep_first": args.keep.keep_first,
        "keep_last": args.keep.keep_last,
        "recent_pages": {name: codec.recent_pages for name, codec in codecs.items()},
        "sink_tokens": {name: codec.sink_tokens for name, codec in codecs.items()},
    }


def main(args: Args) -> int:
    """Scores every codec, prints tables, saves a plot; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    say = lambda line: log.print(line, style="dim", soft_wrap=True)
    codecs, tasks = check_args(args)
    # Not the option's default: given names are added to that.
    args = dataclasses.replace(args, model=tuple(dict.fromkeys(args.model)) or ("smollm2",))
    plot = plot_path(args.plot)
    texts = read_texts(args.text or (() if tasks else (PYTHON,)))
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    jobs = [prepare(args, name, codecs, texts, tasks, dtype, say) for name in args.model]
    if plot is None and args.plot == PLOT:
        say("no plot: it needs matplotlib (pip install matplotlib)")
    for text in texts:
        say(f"{text.name}: {text.source}, sha256 {text.sha256[:16]}…")
    jaxkv.keep_compiled_programs()
    results = []
    for job in jobs:
        say(f"{job.name}: {sum(len(source.documents) for source in job.sources)} documents")
        results += measure(job, args.dtype, log)
    title = f"{dtype}, page size {args.page_size}"
    for table in quality_tables(results, title):
        Console(file=sys.stdout, highlight=False, width=200).print(table)
    if plot is not None:
        plot_quality(plot, results, f"{', '.join(args.model)}, {title}")
        say(f"plot saved as {plot}")
    if args.json:
        print_json({**describe(args, codecs, texts, dtype), "results": results})
    return 0


if __name__ == "__main__":
    run_command(main, Args)
