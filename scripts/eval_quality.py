"""What a quantized cache costs on a real text: KL divergence and perplexity against the exact one.

Teacher-forced, chunk by chunk, through the same caches that generation uses: every codec's cache
takes a chunk right after the exact one did, so that no more than a chunk's distributions are alive.
"""

import dataclasses
import functools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import jaxkv
import models
from jaxkv.codecs import KVCodec, codec_names, get_codec
from models.checkpoints.errors import one_line
from models.loaders import architecture_config
from models.smollm2 import cache_folder
from scripts.plan import Codecs, choose_codecs, make_table
from scripts.shared.command import keep_compiled_programs, run_command
from scripts.shared.texts import read_text

Array = jax.Array | np.ndarray

PLOT = "eval_quality.png"
REPORT_SECONDS = 10.0  # between lines of progress where there is no terminal


@dataclasses.dataclass
class Args:
    """Measures KV codecs on a text: KL, perplexity and top-1 agreement against the exact cache.

    Examples:
      eval_quality.py
      eval_quality.py --codec 4bit_nc --codec tq4 --tokens 4096 --json
      eval_quality.py --codec 3bit_nc --recent-pages 2 --sink-tokens 4 --text book.txt
    """

    model: str = "smollm2"
    """'smollm2' (98 MB, fetched once), a GGUF file, or a Hugging Face folder."""
    codec: Codecs = ()
    """Codec to measure; repeat for several. Default: all but 'exact'."""
    text: Path | None = None
    """File to score; default: chapters of the Python reference that ship with Python."""
    tokens: int = 2048
    """Tokens read; all but the first are scored."""
    recent_pages: int | None = None
    """Newest pages that stay exact; default: what each codec defines (published ones: 0)."""
    sink_tokens: int | None = None
    """First tokens that stay exact, and beside --window for ever; default: the codec's."""
    keep_first: int = 0
    """So many of the first layers stay exact."""
    keep_last: int = 0
    """So many of the last layers stay exact."""
    window: int | None = None
    """Tokens a query sees, in the exact cache, too."""
    page_size: int = 64
    """Tokens a cache page."""
    chunk: int = 256
    """Tokens a step; the result does not depend on it."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and exact pages; default: float32 on a CPU, bfloat16 elsewhere."""
    plot: str = PLOT
    """Where the plot of KL against bits goes; '' or 'none' for no plot."""
    json: bool = False
    """Last line of standard output: one JSON object."""


class Scores(NamedTuple):
    """A codec's next-token distributions beside the exact ones, each `f32[tokens]`."""

    kl: Array  # KL(exact || codec), nats
    exact_log_prob: Array  # of the target
    log_prob: Array
    agrees: Array  # 1 where both prefer the same token


@functools.partial(jax.jit, donate_argnames="cache")
def predict(model, tokens, count, cache):
    """Runs `tokens`, `i32[1, chunk]`, of which `count` are real.

    Returns:
      Log-probabilities of the next token, `f32[chunk, vocab]`, and the cache.
    """
    count = jnp.asarray(count, jnp.int32)[None]
    hidden, cache = model(tokens, cache.prepare(count))
    logits = model.unembed(hidden)[0].astype(jnp.float32)
    return jax.nn.log_softmax(logits, axis=-1), cache.commit(count)


@functools.partial(jax.jit, donate_argnames="cache")
def score(model, tokens, targets, count, exact, cache):
    """Runs a codec's cache over what gave the log-probabilities `exact`.

    Returns:
      `Scores` of the chunk's rows, and the cache.
    """
    coded, cache = predict(model, tokens, count, cache)
    find = lambda x: jnp.take_along_axis(x, targets[:, None], axis=1)[:, 0]
    agrees = jnp.argmax(exact, axis=-1) == jnp.argmax(coded, axis=-1)
    scores = Scores(
        kl=kl_divergence(exact, coded),
        exact_log_prob=find(exact),
        log_prob=find(coded),
        agrees=agrees.astype(jnp.float32),
    )
    return scores, cache


def kl_divergence(p_log: jax.Array, q_log: jax.Array) -> jax.Array:
    """`sum(p * log(p / q))` over the last axis, nats, from log-probabilities.

    Summed as `p * (d + exp(-d) - 1)` with `d = log(p / q)`, which is the same as both sum to 1:
    no term is negative, so rounding can't drown a small divergence.
    """
    d = p_log - q_log
    near = jnp.abs(d) < 1  # elsewhere nothing cancels, and exp(-d) might overflow
    small = jnp.where(near, d, 0)
    p, q = jnp.exp(p_log), jnp.exp(q_log)
    return jnp.sum(jnp.where(near, p * (small + jnp.expm1(-small)), p * d - p + q), axis=-1)


def compare_caches(
    model,
    tokens: np.ndarray,
    exact: jaxkv.CacheConfig,
    coded: dict[str, jaxkv.CacheConfig],
    *,
    begin: Callable[[str, int], None] = lambda name, tokens: None,
) -> tuple[dict[str, Scores], dict[str, jaxkv.KVCache]]:
    """Scores `tokens`, `i32[n]`, through the exact cache and each codec's.

    Args:
      model: a `Decoder`.
      tokens: the text.
      exact: the exact cache; a chunk has its `max_new_tokens` tokens.
      coded: each codec's cache.
      begin: told before each step whose cache takes how many tokens.

    Returns:
      Scores of the `n - 1` predictions, and the caches that made them, by codec.

    Raises:
      ValueError: a prediction that is not finite.
    """
    reference = jaxkv.KVCache.create(exact)
    caches = {name: jaxkv.KVCache.create(config) for name, config in coded.items()}
    parts: dict[str, list[Scores]] = {name: [] for name in coded}
    for inputs, targets, count in chunks(tokens, exact.max_new_tokens):
        begin("exact", count)
        expected, reference = predict(model, inputs, count, reference)
        for name in coded:
            begin(name, count)
            found, caches[name] = score(model, inputs, targets, count, expected, caches[name])
            parts[name].append(Scores(*(np.asarray(x)[:count] for x in found)))
    scores = {
        name: Scores(*map(np.concatenate, zip(*part, strict=True))) for name, part in parts.items()
    }
    for name, found in scores.items():
        if not all(np.isfinite(x).all() for x in found):
            raise ValueError(f"codec {name!r} or this model gives predictions that are not finite.")
    return scores, caches


def chunks(tokens: np.ndarray, size: int) -> Iterator[tuple[jax.Array, jax.Array, int]]:
    """Inputs `i32[1, size]`, their targets `i32[size]` and how many are real, in order."""
    for start in range(0, len(tokens) - 1, size):
        stop = min(start + size, len(tokens) - 1)
        pad = lambda x: jnp.asarray(np.pad(x, (0, size - len(x))), jnp.int32)
        yield pad(tokens[start:stop])[None], pad(tokens[start + 1 : stop + 1]), stop - start


def stored_bits(cache: jaxkv.KVCache) -> float:
    """Bits per cached number that the live arrays take, exact tokens beside codes left out.

    Keys and values, factors and page means, layout padding; layers averaged.
    """
    bits = 0.0
    for state, group in zip(cache.groups, cache.config.groups, strict=True):
        store = state.exact if state.body is None else state.body
        assert store is not None
        spec = group.spec
        values = 2 * spec.kv_heads * spec.head_dim * cache.config.page_size  # of a layer's page
        bits += 8 * store.page_bytes / values  # a page over the group's layers
    return bits / len(cache.config.layers)


def summarize(name: str, scores: Scores, bits: float) -> dict:
    """One codec's results."""
    loss = np.mean(np.float64(scores.exact_log_prob) - np.float64(scores.log_prob))
    return {
        "codec": name,
        "bits_per_value": bits,
        "kl": float(np.mean(np.float64(scores.kl))),
        "kl_p99": float(np.percentile(scores.kl, 99)),
        "ppl_ratio": float(np.exp(loss)),
        "top1": float(np.mean(scores.agrees)),
    }


class Reporter:
    """Shows progress through all caches: a bar on a terminal, else a line now and then."""

    def __init__(self, log: Console, caches: int, tokens: int):
        self.log, self.caches, self.tokens = log, caches, tokens
        self.seen: set[str] = set()
        self.done = self.running = 0  # tokens times caches
        self.start: tuple[float, int] | None = None  # time and `done` when all was compiled
        self.said = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            console=log,
            transient=True,
            disable=not log.is_terminal,
        )
        self.task = self.bar.add_task("loading weights", total=caches * tokens)

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def begin(self, name: str, tokens: int) -> None:
        """A cache begins a step of `tokens`; the step before it has ended."""
        now = time.monotonic()
        self.done, self.running = self.done + self.running, tokens
        if name not in self.seen:
            self.seen.add(name)
            doing, left = f"compiling {name}, cache {len(self.seen)} of {self.caches}", ""
        else:
            self.start = self.start or (now, self.done)
            speed = (self.done - self.start[1]) / max(now - self.start[0], 1e-9)
            doing = f"scoring {name}, {speed:.0f} tokens/s" if speed else f"scoring {name}"
            rest = self.caches * self.tokens - self.done
            left = f", {rest / speed:.0f} s left" if speed else ""
        self.bar.update(self.task, completed=self.done, description=doing)
        if not self.log.is_terminal and now - self.said >= REPORT_SECONDS:
            self.said = now
            at = f"token {self.done // self.caches} of {self.tokens}"
            self.log.print(f"{at}: {doing}{left}", style="dim", soft_wrap=True)


def print_results(
    console: Console, results: list[dict], codecs: dict[str, KVCodec], title: str
) -> None:
    """The table by codec, in the order asked for."""
    kept = [codecs[row["codec"]] for row in results]
    columns = {
        "codec": [row["codec"] for row in results],
        "bits per\nvalue": [f"{row['bits_per_value']:.2f}" for row in results],
        "exact\npages": [str(codec.recent_pages) if codec.lossy else "all" for codec in kept],
        "exact\nsinks": [str(codec.sink_tokens) if codec.lossy else "all" for codec in kept],
        "KL": [f"{row['kl']:.5f}" for row in results],
        "KL\np99": [f"{row['kl_p99']:.4f}" for row in results],
        "PPL\nratio": [f"{row['ppl_ratio']:.4f}" for row in results],
        "top-1": [f"{row['top1']:.4f}" for row in results],
    }
    console.print(make_table(title, columns))


def check_plot(plot: str) -> Path | None:
    """Where the plot goes, or None for nowhere; raises ValueError if it can't be made.

    The default is only a wish: without matplotlib it is None.
    """
    if plot.lower() in ("", "none"):
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        if plot == PLOT:
            return None
        raise ValueError(f"--plot {plot}: needs matplotlib ({one_line(error)}).") from None
    path = Path(plot).expanduser()
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot {plot}: must end in one of {', '.join(sorted(known))}.")
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--plot {plot}: must be a file in a folder that exists.")
    return path


def save_plot(path: Path, results: list[dict], title: str) -> None:
    """KL (log scale) against bits per value; a codec without loss has no place on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in results if row["kl"] > 0]
    own = {row["codec"]: get_codec(row["codec"]).key_mean is not None for row in shown}
    for is_own, label, color, marker in (
        (False, "published and 8-bit formats", "#b3541e", "o"),
        (True, "jaxkv recipes", "#1f5fa8", "s"),
    ):
        rows = [row for row in shown if own[row["codec"]] == is_own]
        x, y = [row["bits_per_value"] for row in rows], [row["kl"] for row in rows]
        if rows:
            axes.scatter(x, y, color=color, marker=marker, label=label, zorder=3)
        for row in rows:
            axes.annotate(
                row["codec"],
                (row["bits_per_value"], row["kl"]),
                xytext=(6, 4),
                textcoords="offset points",
                color=color,
                fontsize=9,
            )
    if shown:
        axes.set_yscale("log")
        axes.legend(loc="best")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("stored bits per value (exact tokens left out)")
    axes.set_ylabel("mean KL(exact || codec) of the next token, nats")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    figure.savefig(path)


def check_context(args: Args, model: models.DecoderConfig) -> None:
    """Raises ValueError if the text is longer than what the model was trained on."""
    longest = model.max_position
    if args.window is None and longest is not None and args.tokens > longest:
        raise ValueError(
            f"--tokens {args.tokens} must be at most the model's trained context, {longest} "
            "(or give a --window)."
        )


def cache_config(
    model: models.DecoderConfig, codec: str | KVCodec, dtype: str, args: Args
) -> jaxkv.CacheConfig:
    """The cache that holds the text under `codec`.

    A window that was asked for keeps the sinks beside it, as it does without quantization.
    """
    keep = jaxkv.Keep(
        dtype=dtype,
        window=args.window,
        sink_tokens=0 if args.window is None else args.sink_tokens or 0,
        codec=codec,
        keep_first=args.keep_first,
        keep_last=args.keep_last,
    )
    return jaxkv.CacheConfig(
        layers=model.layer_specs(keep),
        batch=1,
        max_tokens=args.tokens,
        max_new_tokens=min(args.chunk, args.tokens - 1),
        page_size=args.page_size,
    ).checked()


def main(args: Args) -> int:
    """Scores every codec, prints a table, saves a plot; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    say = lambda line: log.print(line, style="dim", soft_wrap=True)
    names = args.codec or tuple(name for name in codec_names() if name != "exact")
    codecs = choose_codecs(names, recent_pages=args.recent_pages, sink_tokens=args.sink_tokens)
    if args.tokens < 2:
        raise ValueError(f"--tokens {args.tokens} must be at least 2: one predicts the next.")
    if args.chunk < 1:
        raise ValueError(f"--chunk {args.chunk} must be at least 1.")
    plot = check_plot(args.plot)
    text = read_text(args.text)
    checkpoint = models.open_checkpoint(args.model, say=say)
    architecture = architecture_config(checkpoint.config)
    check_context(args, architecture)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    configs = {
        name: cache_config(architecture, codec, dtype, args) for name, codec in codecs.items()
    }
    exact = cache_config(architecture, "exact", dtype, args)
    tokens = np.asarray(checkpoint.load_tokenizer().encode(text.text)[: args.tokens], np.int32)
    if len(tokens) < args.tokens:
        raise ValueError(
            f"{text.source} has {len(tokens)} tokens, fewer than --tokens {args.tokens}."
        )
    if plot is None and args.plot == PLOT:
        say("no plot: it needs matplotlib (pip install matplotlib)")
    say(f"scoring {text.source}, sha256 {text.sha256[:16]}…")
    keep_compiled_programs(cache_folder() / "xla")
    # A scan is slower on a CPU, and compiles in a third of the time, which is most of a run.
    alike = all(len(config.groups) == 1 for config in (exact, *configs.values()))
    with Reporter(log, 1 + len(codecs), len(tokens) - 1) as reporter:
        model = models.load(checkpoint, dtype=args.dtype, scan=alike)
        scores, caches = compare_caches(model, tokens, exact, configs, begin=reporter.begin)
    results = [summarize(name, scores[name], stored_bits(caches[name])) for name in codecs]
    title = f"{args.model}, {len(tokens)} tokens of text, {dtype}, page size {args.page_size}"
    print_results(Console(file=sys.stdout, highlight=False), results, codecs, title)
    if plot is not None:
        save_plot(plot, results, title)
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
            "window": args.window,
            "keep_first": args.keep_first,
            "keep_last": args.keep_last,
            "recent_pages": {name: codec.recent_pages for name, codec in codecs.items()},
            "sink_tokens": {name: codec.sink_tokens for name, codec in codecs.items()},
        }
        print(json.dumps({**about, "results": results}))
    return 0


if __name__ == "__main__":
    run_command(main, Args)
