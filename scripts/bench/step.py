"""Decode steps of a whole model of random weights: tokens per second, and what the time goes into.

The cache is filled without running a prompt: pages are reserved step by step, as `generate` does,
then the pools get random codes, factors and values. Decoding runs the program that `generate` runs.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

import jaxkv
import models
from jaxkv.codecs import get_codec
from jaxkv.generation import decode_block, start
from models.random_weights import named_shape
from scripts.bench.peers import llama
from scripts.bench.timing import device_kernels
from scripts.plan import make_table
from scripts.shared.command import run_command

Names = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")]
Numbers = Annotated[tyro.conf.UseAppendAction[tuple[int, ...]], tyro.conf.arg(metavar="N")]

ATTENTION = ("paged_attention", "plan_work", "rotate_rows")  # in the names of our kernels
GEMMS = ("gemm", "cutlass", "nvjet", "cublas", "splitK", "dot")


@dataclasses.dataclass
class Args:
    """Measures decode steps of a model of random weights, whose cache holds --context tokens.

    Examples:
      step.py --shape llama3-8b --batch 1 --batch 64 --codec fp8_e4m3 --codec tq4
      step.py --batch 1 --batch 8 --codec exact --peers
    """

    shape: str = "llama3-8b"
    """Whose sizes: 'llama3-8b', 'llama3-1b' or 'tiny'."""
    batch: Numbers = ()
    """Sequences side by side; repeat for several. Default: 1, 8 and 64."""
    codec: Names = ()
    """How the cache keeps keys and values; repeat. Default: exact, fp8_e4m3 and tq4."""
    context: int = 8192
    """Tokens of each sequence when measuring begins."""
    steps: int = 32
    """Decode steps of one program."""
    repeats: int = 3
    """Programs run; the median counts."""
    dtype: str = "bfloat16"
    """Of weights and exact pages."""
    scan: bool = False
    """Scan over stacked layers: compiles sooner, may copy weights."""
    memory: float = 78.0
    """GiB of the device; what needs more is left out."""
    peers: bool = False
    """Measure transformers' `generate` with a static cache beside: eager, and compiled."""
    peer_seconds: float = 120.0
    """A peer's case that takes longer is given up."""
    kernels: int = 0
    """Also list the N kinds of kernels that take longest, with launches and time a step."""
    json: bool = False
    """Last line of standard output: one JSON object."""


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _fill_pool(pool: jax.Array, seed: int, mask: int) -> jax.Array:
    """Random words of the bits of `mask`, or small numbers."""

    def fill_layer(i, pool):  # in place: a second pool may not fit
        key = jax.random.fold_in(jax.random.key(seed), i)
        if jnp.issubdtype(pool.dtype, jnp.integer):
            bits = jnp.dtype(f"uint{8 * pool.dtype.itemsize}")
            x = jax.random.bits(key, pool.shape[1:], bits) & bits.type(mask & jnp.iinfo(bits).max)
            x = jax.lax.bitcast_convert_type(x, pool.dtype)
        else:
            x = 0.1 * jax.random.normal(key, pool.shape[1:], jnp.bfloat16)
        return jax.lax.dynamic_update_index_in_dim(pool, x.astype(pool.dtype), i, 0)

    return jax.lax.fori_loop(0, pool.shape[0], fill_layer, pool)


def fill_pages(pages):
    """The pools, donated, with random codes, factors and values."""
    seeds = itertools.count()

    def fill_one(path, pool):
        # Words of two float16 factors hold small ones; bytes of float8 are finite.
        factors = "factors" in jax.tree_util.keystr(path)
        return _fill_pool(pool, next(seeds), 0x33333333 if factors else 0x77777777)

    return jax.tree.map_with_path(fill_one, pages)


def fill(cache: jaxkv.KVCache, context: int) -> jaxkv.KVCache:
    """A cache whose sequences hold `context` tokens of random content."""
    step = cache.config.max_new_tokens

    @functools.partial(jax.jit, donate_argnums=0)
    def reserve(cache):
        left = jnp.minimum(context - cache.lengths, step)
        return cache.prepare(left).commit(left)

    for _ in range(-(-context // step)):
        cache = reserve(cache)
    fresh = lambda store: dataclasses.replace(store, pages=fill_pages(store.pages))
    groups = tuple(state.map(fresh) for state in cache.groups)
    return dataclasses.replace(cache, groups=groups)


def kind(kernel: str) -> str:
    """What a kernel's time goes into."""
    if any(name in kernel for name in ATTENTION):
        return "attention"
    return "weights" if any(name in kernel for name in GEMMS) else "rest"


def time_by_kind(kernels: list[tuple[float, str, float]]) -> dict[str, float]:
    """Milliseconds of each kind, `device_kernels`' in all."""
    times: dict[str, float] = dict.fromkeys(("attention", "weights", "rest"), 0.0)
    for _, name, us in kernels:
        times[kind(name)] += us / 1e3
    return times


def list_kernels(
    kernels: list[tuple[float, str, float]], steps: int, most: int
) -> dict[str, list[str]]:
    """Columns of a table: launches and microseconds a step of each kind, the longest first.

    XLA numbers the fusions of a program; those that differ by their number alone are one kind.
    """
    times: dict[str, list[float]] = {}
    for _, name, us in kernels:
        times.setdefault(re.sub(r"[._]\d+$", "", name), []).append(us)
    longest = sorted(times, key=lambda name: -sum(times[name]))[:most]
    return {
        "kernel": [name[:80] for name in longest],
        "launches": [f"{len(times[name]) / steps:.1f}" for name in longest],
        "us": [f"{sum(times[name]) / steps:.1f}" for name in longest],
        "us each": [f"{np.mean(times[name]):.2f}" for name in longest],
    }


def keep(name: str, rows: list[dict]) -> None:
    """Writes what is measured so far into the folder $OUT, if there is one."""
    if "OUT" in os.environ:
        with open(f"{os.environ['OUT']}/{name}.json", "w") as file:
            json.dump(rows, file)


def measure_peers(
    args: Args,
    config: models.DecoderConfig,
    batches: Sequence[int],
    log: Console,
    *,
    prompts: bool = False,
) -> list[dict]:
    """A row like ours of every peer's case that fits and ends well; logs each when it is ready.

    Decode steps, eager and compiled, or with `prompts` reading them, eager.
    """
    rows = []
    for batch, compiled in itertools.product(batches, (False,) if prompts else (False, True)):
        case = llama.Case(
            layers=config.layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            q_heads=config.q_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            dtype=args.dtype,
            batch=batch,
            context=args.context,
            steps=args.steps,
            repeats=args.repeats,
            compiled=compiled,
            prompts=prompts,
        )
        if case.bytes > (args.memory - 2) * 2**30:
            need = f"{case.bytes / 2**30:.1f} GiB of weights, cache and prompt"
            log.print(f"batch {batch}, {case.name}: {need} do not fit")
            continue
        try:
            rows.append(llama.run_case(case, limit=args.peer_seconds))
        except RuntimeError as error:
            log.print(f"batch {batch}, {case.name}: {error}")
            continue
        log.print(f"batch {batch} {case.name}: {rows[-1]}", soft_wrap=True)
        keep("bench_step_peers", rows)
    return rows


def main(args: Args) -> int:
    """Measures every batch and codec, prints a table; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    config = named_shape(args.shape)
    batches = args.batch or (1, 8, 64)
    codecs = args.codec or ("exact", "fp8_e4m3", "tq4")
    for name in codecs:
        get_codec(name)
    # Peers come first: JAX gives no memory back once it has taken it, so this process must not have
    # touched the device yet.
    peers: list[dict] = []
    if args.peers:
        llama.check_packages()
        peers = measure_peers(args, config, batches, log)
    device = jax.devices()[0].device_kind
    log.print(f"{device}, jax {jax.__version__}, {args.shape}, {args.dtype}")
    began = time.perf_counter()
    model = models.random_model(args.shape, scan=args.scan, dtype=args.dtype)
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    read = weights - model.embedding.get_value().nbytes  # a step gathers few of its rows
    log.print(f"weights {weights / 2**30:.2f} GiB after {time.perf_counter() - began:.0f} s")
    cases = {}
    for batch in batches:
        for codec in codecs:
            cache = jaxkv.CacheConfig(
                layers=model.layer_specs(jaxkv.Keep(codec=codec)),
                batch=batch,
                max_tokens=args.context + args.steps * (args.repeats + 3),
                max_new_tokens=8,
            ).checked()
            total = jaxkv.plan(cache).total
            if total + weights > (args.memory - 2) * 2**30:
                log.print(f"batch {batch}, {codec}: cache of {total / 2**30:.1f} GiB does not fit")
            else:
                cases[batch, codec] = cache
    draw = lambda batch: (
        jaxkv.Sampling(),
        jnp.uint32(0),
        jnp.zeros(0, jnp.int32),
        jnp.full(batch, 2**30, jnp.int32),
    )

    def lower(case):
        batch, _ = case
        cache = jax.eval_shape(lambda: jaxkv.KVCache.create(cases[case]))
        last = jax.ShapeDtypeStruct((batch, config.hidden_size), jnp.dtype(args.dtype))
        state = jax.eval_shape(start, model, cache, last, *draw(batch))
        return decode_block.lower(model, state, *draw(batch), steps=args.steps, backend=None)

    lowered = {case: lower(case) for case in cases}
    log.print(f"traced {len(lowered)} programs after {time.perf_counter() - began:.0f} s")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = dict(
            zip(lowered, pool.map(lambda x: x.compile(), lowered.values()), strict=True)
        )
    log.print(f"compiled {len(compiled)} programs after {time.perf_counter() - began:.0f} s")
    rows = []
    for (batch, codec), cache_config in cases.items():
        cache = fill(jaxkv.KVCache.create(cache_config), args.context)
        last = jnp.ones((batch, config.hidden_size), args.dtype)
        state = jax.block_until_ready(start(model, cache, last, *draw(batch)))
        run = compiled[batch, codec]
        seconds = []
        for _ in range(args.repeats + 1):
            begin = time.perf_counter()
            state, out, _ = run(model, state, *draw(batch))
            jax.block_until_ready(out)
            seconds.append((time.perf_counter() - begin) / args.steps)
        holder = [state]

        def once(run=run, holder=holder, batch=batch):
            holder[0], out, _ = run(model, holder[0], *draw(batch))
            return out

        kernels = device_kernels([once])
        parts = {name: ms / args.steps for name, ms in time_by_kind(kernels).items()}
        if args.kernels:
            title = f"kernels of batch {batch}, {codec}, a step"
            log.print(make_table(title, list_kernels(kernels, args.steps, args.kernels)))
        del state, cache, holder
        abstract = jax.eval_shape(lambda c=cache_config: jaxkv.KVCache.create(c))
        body = [s.body or s.exact for s in abstract.groups]
        pages = batch * math.ceil(args.context / cache_config.page_size)
        stored = sum(pages * store.page_bytes for store in body)
        step_ms = 1e3 * float(np.median(seconds[1:]))
        rows.append(
            {
                "batch": batch,
                "codec": codec,
                "tokens_per_second": batch / step_ms * 1e3,
                "step_ms": step_ms,
                "spread": float(np.ptp(seconds[1:]) / np.median(seconds[1:])),
                "attention_ms": parts["attention"],
                "weights_ms": parts["weights"],
                "rest_ms": parts["rest"],
                "outside": 1 - (parts["attention"] + parts["weights"]) / step_ms,
                "kv_gb": stored / 1e9,
                "weights_gb": read / 1e9,
            }
        )
        log.print(f"batch {batch} {codec}: {rows[-1]}", soft_wrap=True)
        keep("bench_step", rows)
    shown = sorted(rows + peers, key=lambda row: row["batch"])
    number = lambda key, form: [format(row[key], form) if key in row else "" for row in shown]
    columns = {
        "batch": number("batch", "d"),
        "codec or peer": [row["codec"] for row in shown],
        "tokens/s": number("tokens_per_second", ",.0f"),
        "step ms": number("step_ms", ".2f"),
        "spread": number("spread", ".1%"),
        "attention\nms": number("attention_ms", ".2f"),
        "weights\nms": number("weights_ms", ".2f"),
        "rest\nms": number("rest_ms", ".2f"),
        "outside\nboth": number("outside", ".1%"),
        "KV GB": number("kv_gb", ".2f"),
    }
    title = f"{args.shape}, {args.context} tokens, {device}; weights read {read / 1e9:.1f} GB"
    Console(file=sys.stdout, highlight=False).print(make_table(title, columns))
    if args.json:
        report = {"shape": args.shape, "context": args.context, "results": rows, "peers": peers}
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_command(main, Args)
