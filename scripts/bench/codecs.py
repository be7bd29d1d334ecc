"""What each codec costs a decode step: the same model, the same tokens, one cache beside the other.

Every cache takes the next step in turn, so that a busy machine slows all alike. Steps are averaged
over whole pages, so that quantizing a page, which one step in `page_size` does, is in the mean.
"""

import dataclasses
import functools
import json
import sys
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

import jaxkv
import models
from jaxkv.codecs import get_codec
from models.smollm2 import cache_folder
from scripts.plan import make_table
from scripts.shared.command import keep_compiled_programs, run_command

Codecs = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")]
WARM_UP = 4  # steps of each cache before the clock starts


@dataclasses.dataclass
class Args:
    """Prints the time of a decode step for each codec, relative to the exact cache."""

    model: str = "smollm2"
    """'smollm2', a GGUF file, or a Hugging Face folder."""
    codec: Codecs = ()
    """Codec to measure beside exact; repeat for several. Default: 4bit_nc, tq4, tq3 and int8."""
    batch: int = 1
    """Sequences side by side, all of the same length."""
    context: int = 1024
    """Tokens in the cache when measuring begins, random ones."""
    pages: int = 2
    """Pages of steps measured."""
    page_size: int = 64
    """Tokens a cache page."""
    chunk: int = 256
    """Tokens of a prefill step."""
    json: bool = False
    """Last line of standard output: one JSON object."""


@functools.partial(jax.jit, donate_argnames="cache")
def step(model, tokens, cache):
    """Feeds `tokens`, `i32[batch, n]`; returns the next ones, `i32[batch, 1]`, and the cache."""
    count = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    hidden, cache = model(tokens, cache.prepare(count))
    logits = model.unembed(hidden[:, -1:])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache.commit(count)


def main(args: Args) -> int:
    """Measures, prints a table; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    codecs = args.codec or ("4bit_nc", "tq4", "tq3", "int8")
    names = ("exact", *(name for name in codecs if name != "exact"))
    for name in names:
        get_codec(name)
    for name in ("batch", "context", "pages", "chunk"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1.")
    keep_compiled_programs(cache_folder() / "xla")
    model = models.load(models.open_checkpoint(args.model, say=log.print))
    steps = args.pages * args.page_size
    rng = np.random.default_rng(0)
    shape = (args.batch, args.context)
    prompt = jnp.asarray(rng.integers(0, model.config.vocab_size, shape), jnp.int32)
    caches, tokens = {}, {}
    for name in track(names, "compiling and prefilling", console=log, transient=True):
        config = jaxkv.CacheConfig(
            layers=model.layer_specs(jaxkv.Keep(codec=name)),
            batch=args.batch,
            max_tokens=args.context + steps + WARM_UP,
            max_new_tokens=min(args.chunk, args.context),
            page_size=args.page_size,
        )
        cache = jaxkv.KVCache.create(config)
        for start in range(0, args.context, args.chunk):
            tokens[name], cache = step(model, prompt[:, start : start + args.chunk], cache)
        for _ in range(WARM_UP):
            _, cache = step(model, tokens[name], cache)
        caches[name] = cache
    seconds = {name: [] for name in names}
    for _ in track(range(steps), "decoding", console=log, transient=True):
        for name in names:
            start = time.perf_counter()
            token, caches[name] = step(model, tokens["exact"], caches[name])
            jax.block_until_ready(token)
            seconds[name].append(time.perf_counter() - start)
    results = []
    for name in names:
        ms = 1e3 * np.asarray(seconds[name])
        base = np.mean(seconds["exact"]) * 1e3
        results.append(
            {
                "codec": name,
                "mean_ms": float(ms.mean()),
                "median_ms": float(np.median(ms)),
                "p90_ms": float(np.percentile(ms, 90)),
                "most_ms": float(ms.max()),
                "overhead": float(ms.mean() / base - 1),
            }
        )
    columns = {
        "codec": [r["codec"] for r in results],
        "mean ms\na step": [f"{r['mean_ms']:.2f}" for r in results],
        "median": [f"{r['median_ms']:.2f}" for r in results],
        "90 %": [f"{r['p90_ms']:.2f}" for r in results],
        "longest": [f"{r['most_ms']:.1f}" for r in results],
        "mean over\nexact": [f"{r['overhead']:+.1%}" for r in results],
    }
    title = f"{args.model}, batch {args.batch}, {args.context} tokens and on, {steps} steps each"
    Console(file=sys.stdout, highlight=False).print(make_table(title, columns))
    if args.json:
        about = {"model": args.model, "batch": args.batch, "context": args.context, "steps": steps}
        print(json.dumps({**about, "results": results}))
    return 0


if __name__ == "__main__":
    run_command(main, Args)
