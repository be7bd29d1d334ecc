"""Prompts of a whole model of random weights: tokens per second, and where the time goes.

It runs the program that `generate` runs for each chunk, from an empty cache to the whole prompt.
"""

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
from jaxkv.codecs import get_codec
from jaxkv.steps import prefill_chunk
from models.random_weights import draw_decoder, named_shape
from pallas_kernels.backends import Backend
from scripts.bench.cases import GRIDS
from scripts.bench.peers.transformers_llama import check_packages, llama_case, measure_cases
from scripts.bench.results import Out, keep_results, make_folder
from scripts.bench.timing import device_kernels, list_kernels, spread, time_by_kind, timed
from scripts.shared.command import print_json, run_command
from scripts.shared.options import Names, Numbers, check_least
from scripts.shared.progress import working
from scripts.shared.tables import format_column, make_table, words_of

GRID = GRIDS["prefill"]
# The check runs a model of two such layers. A deep one of random weights amplifies rounding to
# bfloat16 until two right programs have nothing in common: 32 layers of 2048 have an error of 1 by
# plain JAX alone. Two layers come to less than a hundredth, a wrong mask or page to about 1.
CHECKED_LAYERS = 2
MAX_ERROR = 0.03  # relative, of the last tokens' hidden states


@dataclasses.dataclass
class Args:
    """Measures how fast a model of random weights reads prompts into its cache.

    Examples:
      prefill.py --shape llama3-8b --chunk 256 --chunk 1024 --codec exact --codec tq4
      prefill.py --codec exact --peers --kernels 20
    """

    shape: str = GRID.models[0]
    """Sizes of the model: 'llama3-8b', 'llama3-1b' or 'tiny'."""
    batch: Numbers = ()
    """Sequences side by side; repeat for several. Default: 1."""
    codec: Names = ()
    """How the cache keeps keys and values; repeat. Default: exact and tq4."""
    tokens: int = GRID.contexts[0]
    """Tokens of each prompt."""
    chunk: Numbers = ()
    """Prompt tokens of one step; repeat. Default: 256 and 1024."""
    repeats: int = 3
    """How often the prompt is read; the median counts."""
    dtype: str = "bfloat16"
    """Of weights and exact pages."""
    backend: Backend | None = None
    """Implementation of the attention; default: the platform's."""
    check: bool = True
    """Compare a model of two such layers with the plain JAX path first."""
    peers: bool = False
    """Also measure transformers, which reads the whole prompt in one step."""
    peer_seconds: float = 120.0
    """A peer's case that takes longer is given up."""
    memory: float = 78.0
    """GiB of the device: a peer's case that needs more is left out."""
    kernels: int = 0
    """Also list the N kinds of kernels that take longest, with launches and time per prompt."""
    out: Out = None
    """Folder for prefill.json and prefill_peers.json, rewritten after each case, so that a run cut
    short loses none; default: none."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


@functools.partial(jax.jit, static_argnames="backend")
def last_hidden(model, cache: jaxkv.KVCache, prompts, last: int, *, backend) -> jax.Array:
    """The hidden states of each prompt's token `last`, whose predecessors are in the cache."""
    one = jnp.ones(prompts.shape[0], jnp.int32)
    tokens = jax.lax.dynamic_slice_in_dim(prompts, last, 1, axis=1)
    return model(tokens, cache.prepare(one), backend=backend)[0][:, 0]


def read_prompts(model, config: jaxkv.CacheConfig, prompts, *, tokens: int, backend) -> jax.Array:
    """Reads `tokens` of each prompt into a fresh cache; returns the last ones' hidden states."""
    cache, chunk = jaxkv.KVCache.create(config), config.max_new_tokens
    lens = jnp.full(config.batch, tokens, jnp.int32)
    for _ in range(-(-(tokens - 1) // chunk)):
        cache, *_ = prefill_chunk(model, cache, None, prompts, lens, chunk=chunk, backend=backend)
    return last_hidden(model, cache, prompts, tokens - 1, backend=backend)


def relative_error(read, backend: Backend | None, tokens: int) -> float:
    """How far the backend's hidden states are from those of plain JAX."""
    got, want = (
        np.asarray(read(tokens=tokens, backend=name), np.float32) for name in (backend, "xla")
    )
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure_peers(args: Args, batches: tuple[int, ...], log: Callable[[str], None]) -> list[dict]:
    """A row of transformers' Llama for each batch."""
    cases = [
        llama_case(
            named_shape(args.shape),
            dtype=args.dtype,
            batch=batch,
            context=args.tokens,
            steps=1,
            repeats=args.repeats,
            compiled=False,
            prompts=True,
        )
        for batch in batches
    ]
    rows = []
    for row in measure_cases(cases, memory=args.memory, limit=args.peer_seconds, log=log):
        rows.append(row)
        keep_results(args.out, "prefill_peers", rows)
    return rows


def measure(args: Args, model, batch: int, codec: str, chunk: int, console: Console) -> dict:
    """One row of the table: checks, warms up, times, and looks into the kernels."""
    chunk = min(chunk, args.tokens)
    shape = (batch, args.tokens)
    prompts = jax.random.randint(jax.random.key(1), shape, 0, model.config.vocab_size)

    def reader(model):
        config = jaxkv.CacheConfig(
            layers=model.layer_specs(jaxkv.Keep(codec=codec)),
            batch=batch,
            max_tokens=args.tokens,
            max_new_tokens=chunk,
        )
        return functools.partial(read_prompts, model, config.checked(), prompts)

    row = {"batch": batch, "codec": codec, "chunk": chunk}
    name = f"batch {batch}, {codec}, chunk {chunk}"
    if args.check:  # a chunk, and some tokens more that read it
        some = min(args.tokens, chunk + 100)
        few = dataclasses.replace(model.config, windows=model.config.windows[:CHECKED_LAYERS])
        shallow = draw_decoder(few, scan=False, dtype=args.dtype)
        with working(console, f"{name}: comparing {CHECKED_LAYERS} layers with plain JAX"):
            row["error"] = relative_error(reader(shallow), args.backend, some)
        del shallow
    read = functools.partial(reader(model), tokens=args.tokens, backend=args.backend)
    with working(console, f"{name}: compiling, first prompt"):
        first = timed(read)[0]
    seconds = []
    for repeat in range(args.repeats):
        with working(console, f"{name}: prompt {repeat + 1} of {args.repeats}"):
            seconds.append(timed(read)[0])
    with working(console, f"{name}: a prompt under the profiler"):
        kernels = device_kernels([read])
    if args.kernels:
        title = f"kernels of batch {batch}, {codec}, chunk {chunk}, per prompt"
        console.print(make_table(title, list_kernels(kernels, 1, args.kernels)))
    matrices = sum(x.size for x in jax.tree.leaves(nnx.state(model)) if x.ndim > 1)
    # Embeddings are looked up, and logits computed once per prompt.
    matrices -= 2 * model.config.vocab_size * model.config.hidden_size
    median = float(np.median(seconds))
    return row | {
        "prefill_tokens_per_second": batch * args.tokens / median,
        "seconds": median,
        "spread": spread(seconds),
        **{f"{name}_ms": ms for name, ms in time_by_kind(kernels).items()},
        "weights_tflops": 2 * matrices * batch * args.tokens / median / 1e12,
        "first_seconds": first,
    }


def show(rows: list[dict], title: str) -> None:
    """Prints the table."""
    number = functools.partial(format_column, sorted(rows, key=lambda row: row["batch"]))
    columns = {
        "batch": number("batch", "d"),
        "codec or peer": number("codec", ""),
        "chunk": number("chunk", "d"),
        "tokens/s": number("prefill_tokens_per_second", ",.0f"),
        "seconds": number("seconds", ".3f"),
        "spread": number("spread", ".1%"),
        "attention\nms": number("attention_ms", ".0f"),
        "weights\nms": number("weights_ms", ".0f"),
        "rest\nms": number("rest_ms", ".0f"),
        "weights\nTFLOP/s": number("weights_tflops", ".3g"),
        "error": number("error", ".1e"),
    }
    Console(file=sys.stdout, highlight=False).print(make_table(title, columns))


def main(args: Args) -> int:
    """Measures every case and prints a table; returns 1 where an error is too large."""
    console = Console(stderr=True, highlight=False)
    log = functools.partial(console.print, soft_wrap=True)
    named_shape(args.shape)
    batches = args.batch or GRID.batches
    for name in args.codec:
        get_codec(name)
    check_least(args, "tokens", "repeats", "chunk", "batch")
    make_folder(args.out)
    peers: list[dict] = []
    if args.peers:  # first: JAX gives no memory back
        check_packages()
        peers = measure_peers(args, batches, log)
    device = jax.devices()[0].device_kind
    log(f"{device}, jax {jax.__version__}, {args.shape}, {args.dtype}")
    with working(console, "drawing weights"):
        model = models.random_model(args.shape, scan=False, dtype=args.dtype)
    rows = []
    codecs, chunks = args.codec or GRID.codecs, args.chunk or GRID.chunks
    for batch, codec, chunk in itertools.product(batches, codecs, chunks):
        rows.append(measure(args, model, batch, codec, chunk, console))
        log(words_of(rows[-1]))
        keep_results(args.out, "prefill", rows)
    show(rows + peers, f"{args.shape}, prompts of {args.tokens} tokens, {device}")
    if args.json:
        report = {"shape": args.shape, "tokens": args.tokens, "results": rows, "peers": peers}
        print_json(report)
    if args.check and not all(row["error"] <= MAX_ERROR for row in rows):
        log(f"an error is more than {MAX_ERROR}: what is wrong can't be called fast")
        return 1
    return 0


if __name__ == "__main__":
    run_command(main, Args)
