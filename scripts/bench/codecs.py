"""What each codec costs per decode step: the same model and tokens, one cache after the other.

Every cache takes the next step in turn, so that a busy machine slows all alike. Steps are averaged
over whole pages, so that the mean includes the one step in `page_size` that quantizes a page.
"""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxkv
import models
from jaxkv.codecs import get_codec
from scripts.bench.cases import GRIDS
from scripts.bench.timing import timed
from scripts.shared.command import print_json, run_command
from scripts.shared.options import Names, check_least
from scripts.shared.progress import working
from scripts.shared.tables import format_column, make_table

GRID = GRIDS["codecs"]
WARM_UP = 4  # steps of each cache before the clock starts


@dataclasses.dataclass
class Args:
    """Prints the time of a decode step for each codec, relative to the exact cache.

    Examples:
      codecs.py
      codecs.py --codec tq4 --batch 8 --context 4096 --pages 1
    """

    model: str = GRID.models[0]
    """'smollm2', a GGUF file, or a Hugging Face folder."""
    codec: Names = ()
    """Codec to measure beside exact; repeat for several. Default: 4bit_nc, tq4, tq3 and int8."""
    batch: int = GRID.batches[0]
    """Sequences side by side, all of the same length."""
    context: int = GRID.contexts[0]
    """Random tokens in the cache when measuring begins."""
    pages: int = 2
    """How many pages of steps are measured."""
    page_size: int = 64
    """Tokens per cache page."""
    chunk: int = 256
    """Prompt tokens of one step."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


@functools.partial(jax.jit, donate_argnames="cache")
def step(model, tokens, cache):
    """Feeds `tokens`, `i32[batch, n]`; returns the next ones, `i32[batch, 1]`, and the cache."""
    count = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    hidden, cache = model(tokens, cache.prepare(count))
    logits = model.unembed(hidden[:, -1:])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache.commit(count)


def fill_caches(args: Args, model, names: tuple[str, ...], steps: int, log: Console) -> tuple:
    """One cache per codec that holds the random prompt, and the token that each predicts."""
    rng = np.random.default_rng(0)
    shape = (args.batch, args.context)
    prompt = jnp.asarray(rng.integers(0, model.config.vocab_size, shape), jnp.int32)
    caches, tokens = {}, {}
    for name in names:
        config = jaxkv.CacheConfig(
            layers=model.layer_specs(jaxkv.Keep(codec=name)),
            batch=args.batch,
            max_tokens=args.context + steps + WARM_UP,
            max_new_tokens=min(args.chunk, args.context),
            page_size=args.page_size,
        )
        cache = jaxkv.KVCache.create(config)
        with working(log, f"{name}: compiling, reading the prompt"):
            for start in range(0, args.context, args.chunk):
                tokens[name], cache = step(model, prompt[:, start : start + args.chunk], cache)
            for _ in range(WARM_UP):
                _, cache = step(model, tokens[name], cache)
            caches[name] = jax.block_until_ready(cache)
    return caches, tokens


def summarize(name: str, seconds: list[float], exact: list[float]) -> dict:
    """One codec's results; `exact` are the seconds of the exact cache's steps."""
    ms = 1e3 * np.asarray(seconds)
    return {
        "codec": name,
        "mean_ms": float(ms.mean()),
        "median_ms": float(np.median(ms)),
        "p90_ms": float(np.percentile(ms, 90)),
        "most_ms": float(ms.max()),
        "overhead": float(ms.mean() / (1e3 * np.mean(exact)) - 1),
    }


def main(args: Args) -> int:
    """Measures, prints a table; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    codecs = args.codec or GRID.codecs
    names = ("exact", *(name for name in codecs if name != "exact"))
    for name in names:
        get_codec(name)
    check_least(args, "batch", "context", "pages", "page_size", "chunk")
    jaxkv.keep_compiled_programs()
    model = models.load(models.open_checkpoint(args.model, say=log.print))
    steps = args.pages * args.page_size
    caches, tokens = fill_caches(args, model, names, steps, log)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with working(log, f"decoding, {steps} steps of {len(names)} caches"):
        for _, name in itertools.product(range(steps), names):
            run = functools.partial(step, model, tokens["exact"], caches[name])
            took, (_, caches[name]) = timed(run)
            seconds[name].append(took)
    results = [summarize(name, seconds[name], seconds["exact"]) for name in names]
    number = functools.partial(format_column, results)
    columns = {
        "codec": number("codec", ""),
        "mean ms\nper step": number("mean_ms", ".2f"),
        "median": number("median_ms", ".2f"),
        "90 %": number("p90_ms", ".2f"),
        "longest": number("most_ms", ".1f"),
        "mean over\nexact": number("overhead", "+.1%"),
    }
    title = f"{args.model}, batch {args.batch}, {args.context} tokens and on, {steps} steps each"
    Console(file=sys.stdout, highlight=False).print(make_table(title, columns))
    if args.json:
        about = {"model": args.model, "batch": args.batch, "context": args.context, "steps": steps}
        print_json({**about, "results": results})
    return 0


if __name__ == "__main__":
    run_command(main, Args)
