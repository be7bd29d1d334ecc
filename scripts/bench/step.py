"""Decode steps of a whole model of random weights: tokens per second, and where the time goes.

The cache is filled without running a prompt; decoding runs the program that `generate` runs.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

import jaxkv
import models
from jaxkv.abstract_cache import abstract_cache
from jaxkv.codecs import get_codec
from jaxkv.draw import rules_of
from jaxkv.steps import NO_TOKEN, Requests, decode_block, start
from models.random_weights import named_shape
from scripts.bench.cases import GRIDS
from scripts.bench.fill import random_cache, stored_bytes
from scripts.bench.peers.transformers_llama import check_packages, llama_case, measure_cases
from scripts.bench.results import Out, keep_results, make_folder
from scripts.bench.timing import device_kernels, list_kernels, spread, time_by_kind, timed
from scripts.shared.command import print_json, run_command
from scripts.shared.options import GIB, Names, Numbers, check_least
from scripts.shared.progress import working
from scripts.shared.tables import format_column, make_table, words_of

GRID = GRIDS["step"]
COMPILE_THREADS = 8


@dataclasses.dataclass
class Args:
    """Measures decode steps of a model of random weights, whose cache holds --context tokens.

    Examples:
      step.py --shape llama3-8b --batch 1 --batch 64 --codec fp8_e4m3 --codec tq4
      step.py --batch 1 --batch 8 --codec exact --peers
    """

    shape: str = GRID.models[0]
    """Sizes of the model: 'llama3-8b', 'llama3-1b' or 'tiny'."""
    batch: Numbers = ()
    """Sequences side by side; repeat for several. Default: 1, 8 and 64."""
    codec: Names = ()
    """How the cache keeps keys and values; repeat. Default: exact, fp8_e4m3 and tq4."""
    context: int = GRID.contexts[0]
    """Tokens of each sequence when measuring begins."""
    steps: int = 32
    """Decode steps of one program."""
    repeats: int = 3
    """Runs of that program; the median counts."""
    dtype: str = "bfloat16"
    """Of weights and exact pages."""
    scan: bool = False
    """Scan over stacked layers: compiles sooner, may copy weights."""
    memory: float = 78.0
    """GiB of the device; cases that need more are left out."""
    peers: bool = False
    """Measure transformers' `generate` with a static cache beside: eager, and compiled."""
    peer_seconds: float = 120.0
    """A peer's case that takes longer is given up."""
    kernels: int = 0
    """Also list the N kinds of kernels that take longest, with launches and time per step."""
    out: Out = None
    """Folder for step.json and step_peers.json, rewritten after each case, so that a run cut short
    loses none; default: none."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def measure_peers(args: Args, batches: tuple[int, ...], log: Callable[[str], None]) -> list[dict]:
    """A row of transformers' Llama for each batch, eager and compiled."""
    cases = [
        llama_case(
            named_shape(args.shape),
            dtype=args.dtype,
            batch=batch,
            context=args.context,
            steps=args.steps,
            repeats=args.repeats,
            compiled=compiled,
        )
        for batch, compiled in itertools.product(batches, (False, True))
    ]
    rows = []
    for row in measure_cases(cases, memory=args.memory, limit=args.peer_seconds, log=log):
        rows.append(row)
        keep_results(args.out, "step_peers", rows)
    return rows


def configs_that_fit(
    args: Args, model, weights: int, log: Callable[[str], None]
) -> dict[tuple[int, str], jaxkv.CacheConfig]:
    """The cache of each batch and codec that fits beside `weights` bytes of weights."""
    configs = {}
    codecs = args.codec or GRID.codecs
    for batch, codec in itertools.product(args.batch or GRID.batches, codecs):
        config = jaxkv.CacheConfig(
            layers=model.layer_specs(jaxkv.Keep(codec=codec)),
            batch=batch,
            max_tokens=args.context + args.steps * (args.repeats + 3),
            max_new_tokens=8,
        ).checked()
        total = jaxkv.plan(config).total
        if total + weights > (args.memory - 2) * GIB:
            log(f"batch {batch}, {codec}: cache of {total / GIB:.1f} GiB does not fit")
        else:
            configs[batch, codec] = config
    return configs


def greedy(batch: int, context: int) -> Requests:
    """Requests with prompts of `context` tokens, that draw greedily and that no token ends."""
    return Requests(
        prompt_lens=jnp.full(batch, context, jnp.int32),
        seeds=jnp.zeros(batch, jnp.uint32),
        limits=jnp.full(batch, 2**30, jnp.int32),
        stop_ids=jnp.full((batch, 8), NO_TOKEN, jnp.int32),
        rules=rules_of([jaxkv.Sampling().checked()] * batch),
        logprobs=None,
        releases=False,
    )


def one_block(args: Args, batch: int) -> tuple[jax.Array, jax.Array]:
    """The arguments of a whole block of decode steps: no sequence ends before it."""
    return jnp.zeros(batch, bool), jnp.int32(args.steps)


def compile_all(args: Args, model, configs: dict) -> dict:
    """`generate`'s block of decode steps, compiled for each cache, in threads."""

    def lower(config: jaxkv.CacheConfig):
        requests = greedy(config.batch, args.context + 1)
        cache = abstract_cache(config)
        tokens = jax.ShapeDtypeStruct((config.batch, config.max_tokens), jnp.int32)
        state = jax.eval_shape(start, cache, tokens, requests)
        ended, steps = one_block(args, config.batch)
        return decode_block.lower(
            model, state, requests, ended, steps, block=args.steps, backend=None
        )

    lowered = {case: lower(config) for case, config in configs.items()}
    with concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS) as pool:
        compiled = pool.map(lambda program: program.compile(), lowered.values())
        return dict(zip(lowered, compiled, strict=True))


def measure(
    args: Args, model, config: jaxkv.CacheConfig, program: Callable
) -> tuple[dict, list[tuple[float, str, float]]]:
    """Times one case; returns its row of the table, and the kernels of `args.steps` steps."""
    requests = greedy(config.batch, args.context + 1)
    assert config.max_tokens is not None
    shape = (config.batch, config.max_tokens)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, model.vocab_size)
    state = jax.block_until_ready(start(random_cache(config, args.context), tokens, requests))
    program = functools.partial(program, model)
    ended, steps = one_block(args, config.batch)
    seconds = []
    for _ in range(args.repeats + 1):  # the first warms up
        took, (state, *_) = timed(functools.partial(program, state, requests, ended, steps))
        seconds.append(took / args.steps)
    kernels = device_kernels([lambda: program(state, requests, ended, steps)[1]])
    parts = {name: ms / args.steps for name, ms in time_by_kind(kernels).items()}
    step_ms = 1e3 * float(np.median(seconds[1:]))
    row = {
        "tokens_per_second": config.batch / step_ms * 1e3,
        "step_ms": step_ms,
        "spread": spread(seconds[1:]),
        **{f"{name}_ms": ms for name, ms in parts.items()},
        "outside": 1 - (parts["attention"] + parts["weights"]) / step_ms if parts else None,
        "kv_gb": stored_bytes(config, args.context) / 1e9,
    }
    return row, kernels


def show(rows: list[dict], title: str) -> None:
    """Prints the table."""
    number = functools.partial(format_column, sorted(rows, key=lambda row: row["batch"]))
    columns = {
        "batch": number("batch", "d"),
        "codec or peer": number("codec", ""),
        "tokens/s": number("tokens_per_second", ",.0f"),
        "step ms": number("step_ms", ".2f"),
        "spread": number("spread", ".1%"),
        "attention\nms": number("attention_ms", ".2f"),
        "weights\nms": number("weights_ms", ".2f"),
        "rest\nms": number("rest_ms", ".2f"),
        "outside\nboth": number("outside", ".1%"),
        "KV GB": number("kv_gb", ".2f"),
    }
    Console(file=sys.stdout, highlight=False).print(make_table(title, columns))


def main(args: Args) -> int:
    """Measures every batch and codec, prints a table; returns the exit code."""
    console = Console(stderr=True, highlight=False)
    log = functools.partial(console.print, soft_wrap=True)
    named_shape(args.shape)
    for name in args.codec:
        get_codec(name)
    check_least(args, "batch", "context", "steps", "repeats")
    make_folder(args.out)
    # Peers come first: JAX gives no memory back once it has taken it, so this process must not have
    # touched the device yet.
    peers: list[dict] = []
    if args.peers:
        check_packages()
        peers = measure_peers(args, args.batch or GRID.batches, log)
    device = jax.devices()[0].device_kind
    log(f"{device}, jax {jax.__version__}, {args.shape}, {args.dtype}")
    draw = functools.partial(models.random_model, args.shape, scan=args.scan, dtype=args.dtype)
    with working(console, "drawing weights"):
        took, model = timed(draw)
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    read = weights - model.embedding.get_value().nbytes  # each step gathers few of its rows
    log(f"weights, {weights / GIB:.2f} GiB, drawn in {took:.0f} s")
    configs = configs_that_fit(args, model, weights, log)
    with working(console, f"compiling {len(configs)} programs"):
        took, programs = timed(lambda: compile_all(args, model, configs))
    log(f"compiled {len(programs)} programs in {took:.0f} s")
    rows = []
    for (batch, codec), config in configs.items():
        with working(console, f"batch {batch}, {codec}: filling the cache, decoding"):
            row, kernels = measure(args, model, config, programs[batch, codec])
        rows.append({"batch": batch, "codec": codec} | row | {"weights_gb": read / 1e9})
        log(words_of(rows[-1]))
        keep_results(args.out, "step", rows)
        if args.kernels:
            listed = list_kernels(kernels, args.steps, args.kernels)
            console.print(make_table(f"kernels of batch {batch}, {codec}, per step", listed))
    title = f"{args.shape}, {args.context} tokens, {device}; weights read {read / 1e9:.1f} GB"
    show(rows + peers, title)
    if args.json:
        report = {"shape": args.shape, "context": args.context, "results": rows, "peers": peers}
        print_json(report)
    return 0


if __name__ == "__main__":
    run_command(main, Args)
