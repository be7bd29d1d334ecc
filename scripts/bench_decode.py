"""How near decode attention comes to the memory's speed: real workloads, contexts and codecs.

Correctness first: a result too far from the float32 reference fails the run. Then the kernels' own
device time by the profiler, and beside it the wall time of a loop less that of an empty kernel's.
Bytes are those of the stored keys and values that a query sees (codes, factors, page means), read
once; the ceiling is the best read-only reduction in the same run. Coded caches are measured where
every token is coded: what a codec keeps exact beside them is one more, short, call.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from rich.console import Console
from rich.progress import track

from jaxkv.codecs import PageLayout, default_layout, get_codec
from models.checkpoints.errors import one_line
from models.smollm2 import cache_folder
from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import BACKENDS, paged_attention
from pallas_kernels.pages import CodedPages, ExactPages, Pages
from pallas_kernels.quantize_pages.xla import quantize_page
from scripts.command import keep_compiled_programs, run_command
from scripts.device_time import device_kernels
from scripts.plan import GIB, make_table

MAX_ERROR = 3e-3  # relative L2 to the float32 reference on the same stored values
OWN = "paged_attention"  # in the name of every kernel of the op
EXACT_DTYPE = jnp.dtype("bfloat16")
COLD_BYTES = 400e6  # a layer is read again after so many bytes: beyond any L2 cache
CHUNK_VALUES = 2**24  # keys made at once
LOOP_SECONDS = 0.02  # wall time of one loop: long beside its launch
COMPILE_THREADS = 12
TABLE_WIDTH = 170  # least, where the output is no terminal
NOT_VISIBLE = 1e-30  # times an output, added to a query: depends on it, changes nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One layer's attention of a model."""

    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    learned_sinks: bool = False


WORKLOADS = {
    "llama-3-8b": Workload(q_heads=32, kv_heads=8, head_dim=128),
    "llama-3-70b": Workload(q_heads=64, kv_heads=8, head_dim=128),
    "mistral-7b": Workload(q_heads=32, kv_heads=8, head_dim=128, window=4096),
    "gpt-oss-20b": Workload(q_heads=64, kv_heads=8, head_dim=64, learned_sinks=True),
    "gpt-oss-20b-window": Workload(
        q_heads=64, kv_heads=8, head_dim=64, window=128, learned_sinks=True
    ),
    "gemma-3-12b": Workload(q_heads=16, kv_heads=8, head_dim=256),
    "gemma-3-12b-window": Workload(q_heads=16, kv_heads=8, head_dim=256, window=1024),
    "smollm2": Workload(q_heads=9, kv_heads=3, head_dim=64),
    "tiny": Workload(q_heads=8, kv_heads=2, head_dim=64, window=80, learned_sinks=True),
}
DEFAULT_WORKLOADS = tuple(name for name in WORKLOADS if name != "tiny")
DEFAULT_BATCHES = (1, 8, 64)
DEFAULT_CONTEXTS = (1024, 8192, 32768, 131072)
DEFAULT_CODECS = ("exact", "4bit_nc")

Names = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")]
Numbers = Annotated[tyro.conf.UseAppendAction[tuple[int, ...]], tyro.conf.arg(metavar="N")]


@dataclasses.dataclass
class Args:
    """Measures decode attention: time, bytes a second, fraction of the read ceiling, error.

    Examples:
      bench_decode.py --suite issue --plot decode.png --json
      bench_decode.py --workload llama-3-8b --batch 64 --context 8192 --codec exact --codec tq4
      bench_decode.py --workload tiny --batch 2 --context 200
    """

    suite: Literal["issue"] | None = None
    """A list of cases by name, in place of the options that choose them."""
    workload: Names = ()
    """Model to measure; repeat for several. Default: all (but 'tiny', which is for trying this)."""
    batch: Numbers = ()
    """Sequences side by side; repeat for several. Default: 1, 8, 64."""
    context: Numbers = ()
    """Tokens of a sequence; repeat for several. Default: 1k, 8k, 32k, 128k."""
    codec: Names = ()
    """Codec, 'exact' is bfloat16; repeat for several. Default: exact, 4bit_nc."""
    ragged: bool = False
    """Lengths differ: even from an eighth of the context to eleven eighths."""
    page_size: int = 64
    """Tokens a cache page."""
    repeats: int = 16
    """Calls whose median counts."""
    check: bool = True
    """Compare with the reference first."""
    peers: bool = True
    """Also measure JAX's own paged attention and torch's SDPA where they are and serve a case."""
    max_gib: float = 40.0
    """Cases whose pools need more memory are skipped."""
    backend: Literal["gpu", "xla", "reference"] | None = None
    """Who computes; default: gpu on a GPU, xla elsewhere."""
    plot: str = ""
    """File for a plot of the fractions of the read ceiling."""
    json: bool = False
    """Last line of standard output: one JSON object."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: a row of the table."""

    workload: str
    batch: int
    context: int
    codec: str
    ragged: bool = False
    layers: int | None = None  # of the pools; None for as many as it takes

    @property
    def group(self) -> str:
        """Everything but the codec."""
        ragged = " ragged" if self.ragged else ""
        layers = "" if self.layers is None else f" {self.layers} layers"
        return f"{self.workload} b{self.batch} {_short(self.context)}{ragged}{layers}"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def issue_suite() -> list[Case]:
    """The cases of the project's acceptance table."""

    def cases(workload, batch, context, codecs, **options):
        return [
            Case(workload=workload, batch=batch, context=context, codec=codec, **options)
            for codec in codecs
        ]

    both = ("exact", "4bit_nc")
    coded = ("4bit_nc", "tq4", "tq3", "3bit_nc", "fp8_e4m3", "int8", "k8v4", "tq2")
    return [
        *cases("llama-3-8b", 64, 8192, ("exact", *coded)),
        *cases("llama-3-8b", 1, 131072, both),
        *cases("llama-3-8b", 64, 8192, both, ragged=True),
        *cases("llama-3-8b", 8, 65536, ("exact",)),
        *cases("gpt-oss-20b-window", 128, 8192, ("exact",)),
        *cases("gpt-oss-20b-window", 128, 32768, ("exact",)),
        *cases("gpt-oss-20b-window", 128, 131072, ("exact",)),
        *cases("gpt-oss-20b", 128, 8192, both),
        *cases("mistral-7b", 64, 32768, both),
        # Arrays beyond 4 GiB: kernels count with 64-bit offsets there.
        *cases("llama-3-8b", 64, 8192, ("exact",), layers=5),
        *cases("llama-3-8b", 64, 8192, ("4bit_nc",), layers=18),
    ]


def list_cases(args: Args) -> list[Case]:
    """The cases that the arguments choose, codecs of a case together, exact first."""
    if args.suite == "issue":
        return issue_suite()
    codecs = args.codec or DEFAULT_CODECS
    return [
        Case(workload=workload, batch=batch, context=context, codec=codec, ragged=args.ragged)
        for workload in args.workload or DEFAULT_WORKLOADS
        for batch in args.batch or DEFAULT_BATCHES
        for context in args.context or DEFAULT_CONTEXTS
        for codec in sorted(dict.fromkeys(codecs), key=lambda name: name != "exact")
    ]


def check_args(args: Args) -> None:
    """Raises ValueError, one sentence, for what can't be measured."""
    chosen = ("workload", "batch", "context", "codec", "ragged")
    if args.suite and any(getattr(args, name) for name in chosen):
        raise ValueError(
            f"--suite {args.suite} chooses all cases: leave out --{', --'.join(chosen)}."
        )
    for name in args.workload:
        if name not in WORKLOADS:
            raise ValueError(f"workload {name!r} is unknown; there are {', '.join(WORKLOADS)}.")
    for name in args.codec:
        get_codec(name)
    for option in ("batch", "context"):
        for value in getattr(args, option):
            if not 1 <= value < 2**30:
                raise ValueError(f"--{option} {value} must be at least 1 and less than 2**30.")
    for option in ("page_size", "repeats"):
        if getattr(args, option) < 1:
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(args, option)} must be at least 1.")
    if not args.max_gib > 0:
        raise ValueError(f"--max-gib {args.max_gib} must be positive.")
    if args.plot:
        check_plot(args.plot)


# Problems: sizes, which programs are compiled for, and what else a case is.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """All that the shape of a case's arrays and programs depends on."""

    workload: Workload
    batch: int
    width: int  # of the page table
    layers: int
    pages: int
    page_size: int
    layout: PageLayout | None  # None: exact

    @property
    def page_bytes(self) -> int:
        """Stored bytes of a layer's page, all heads, page mean included."""
        shape, layout = self.workload, self.layout
        if layout is None:
            values = 2 * shape.kv_heads * self.page_size * shape.head_dim
            return values * EXACT_DTYPE.itemsize
        return shape.kv_heads * layout.codec.page_bytes(shape.head_dim, self.page_size)

    @property
    def layer_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def steps(self) -> int:
        """Calls of one loop."""
        speed = 3e12 if jax.default_backend() == "gpu" else 3e9
        call = self.layer_bytes / speed + 1e-5
        return int(np.clip(LOOP_SECONDS / call, 4, 512))

    @property
    def checked(self) -> int:
        """Sequences compared with the reference, which holds them in float32."""
        return max(1, min(3, self.batch, 2**17 // (self.width * self.page_size)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A case, its sizes, and its numbers on the host."""

    case: Case
    sizes: Sizes
    lengths: np.ndarray  # [batch]
    table: np.ndarray  # [batch, width], a ring
    read_bytes: float  # that a call must read

    def spans(self, lengths: np.ndarray) -> dict[str, jax.Array]:
        """Positions that the op takes, for sequences of these lengths in the same table."""
        first = _first_page(lengths, self.sizes.workload.window, self.sizes.page_size)
        spans = {
            "q_start": lengths - 1,
            "q_lens": np.ones_like(lengths),
            "kv_start": first * self.sizes.page_size,
            "kv_stop": lengths,
        }
        return {name: jnp.asarray(x, jnp.int32) for name, x in spans.items()}

    def random_lengths(self) -> np.ndarray:
        """Lengths to check with: any, the first at least half of what is timed."""
        rng = np.random.default_rng(1)
        lengths = rng.integers(1, self.lengths + 1)
        lengths[0] = rng.integers(self.lengths[0] // 2 + 1, self.lengths[0] + 1)
        return lengths


def _first_page(lengths: np.ndarray, window: int | None, page_size: int) -> np.ndarray:
    live = lengths if window is None else np.minimum(lengths, window)
    return (lengths - live) // page_size


def make_problem(case: Case, args: Args, platform: str | None = None) -> Problem:
    """Lays a case out: lengths, a table of shuffled pages, pools that do not stay in a cache.

    `platform` is whose layout coded pages have; None for JAX's.

    Raises:
      ValueError: a shape that the codec or its layout can't hold, or too much memory.
    """
    shape, page_size = WORKLOADS[case.workload], args.page_size
    rng = np.random.default_rng(0)
    lengths = np.full(case.batch, case.context)
    if case.ragged:
        low, high = max(1, case.context // 8), max(1, case.context * 11 // 8)
        lengths = rng.integers(low, high + 1, case.batch)
    first = _first_page(lengths, shape.window, page_size)
    counts = -(-lengths // page_size) - first
    width = int(counts.max()) + 1
    live = 1 + int(counts.sum())  # page 0 is the null page
    sequence = np.repeat(np.arange(case.batch), counts)
    ordinal = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.zeros((case.batch, width), np.int32)
    table[sequence, (first[sequence] + ordinal) % width] = rng.permutation(np.arange(1, live))
    chunk = _chunk_pages(shape, page_size, live)
    layout = None
    if case.codec != "exact":
        layout = default_layout(
            get_codec(case.codec),
            platform=platform or jax.default_backend(),
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            page_size=page_size,
        )
    sizes = Sizes(
        workload=shape,
        batch=case.batch,
        width=width,
        layers=1,
        pages=-(-live // chunk) * chunk,
        page_size=page_size,
        layout=layout,
    )
    layers = case.layers or max(2, int(np.ceil(COLD_BYTES / sizes.layer_bytes)))
    if jax.default_backend() == "cpu":
        layers = case.layers or 2
    most = int(args.max_gib * GIB / sizes.layer_bytes)
    if case.layers is None and most == 1:  # tens of GB: a layer drives itself out of any cache
        layers = 1
    if layers > most:
        need = layers * sizes.layer_bytes / GIB
        raise ValueError(f"the pools need {need:.1f} GiB, --max-gib is {args.max_gib:g}")
    tokens = lengths if shape.window is None else np.minimum(lengths, shape.window)
    return Problem(
        case=case,
        sizes=dataclasses.replace(sizes, layers=layers),
        lengths=lengths,
        table=table,
        read_bytes=float(tokens.sum()) * sizes.page_bytes / page_size,
    )


def _chunk_pages(shape: Workload, page_size: int, pages: int) -> int:
    """Pages made at once: the fewest that give the least number of chunks."""
    most = max(1, CHUNK_VALUES // (shape.kv_heads * page_size * shape.head_dim))
    return -(-pages // -(-pages // most))


class Data(NamedTuple):
    """What lives on the device."""

    q: jax.Array  # [batch, 1, q_heads, head_dim]
    pages: Pages
    sink_logits: jax.Array | None  # f32[q_heads]


def make_data(sizes: Sizes, key: jax.Array) -> Data:
    """Normal keys, about a mean of each channel, and values, quantized where there is a codec.

    A chunk of pages at a time: the float32 numbers of all would not fit.
    """
    shape, layout = sizes.workload, sizes.layout
    chunk = _chunk_pages(shape, sizes.page_size, sizes.pages)
    q_key, mean_key, sink_key, pages_key = jax.random.split(key, 4)
    channel_mean = jax.random.normal(mean_key, (shape.kv_heads, 1, shape.head_dim))

    def make_chunk(key):
        dims = (chunk, shape.kv_heads, sizes.page_size, shape.head_dim)
        k, v = jax.random.normal(key, (2, *dims))
        k = k + channel_mean[None]
        if layout is None:
            return k.astype(EXACT_DTYPE), v.astype(EXACT_DTYPE)
        mean = layout.codec.key_page_mean(k) if layout.codec.key_mean else None
        return quantize_page(layout, k, v, mean), mean

    chunks = sizes.layers * sizes.pages // chunk
    made = jax.lax.map(make_chunk, jax.random.split(pages_key, chunks))
    made = jax.tree.map(lambda x: x.reshape(sizes.layers, sizes.pages, *x.shape[2:]), made)
    if layout is None:
        pages = ExactPages(k=made[0], v=made[1])
    else:
        pages = CodedPages(arrays=made[0], key_mean=made[1], layout=layout)
    q_dims = (sizes.batch, 1, shape.q_heads, shape.head_dim)
    sinks = jax.random.normal(sink_key, (shape.q_heads,)) if shape.learned_sinks else None
    return Data(jax.random.normal(q_key, q_dims).astype(EXACT_DTYPE), pages, sinks)


# Programs: all are compiled for shapes alone, before any data is there.

Attend = Callable[..., jax.Array]
Jobs = dict[tuple[str, Sizes], Callable]  # by name
Programs = dict[tuple[str, Sizes], concurrent.futures.Future]


def attend(sizes: Sizes, backend: Backend, data: Data, table, spans, layer) -> jax.Array:
    """The op's output, `f32[batch, 1, q_heads, head_dim]`."""
    return paged_attention(
        data.q,
        data.pages,
        table,
        layer=layer,
        **spans,
        scale=sizes.workload.head_dim**-0.5,
        window=sizes.workload.window,
        sink_logits=data.sink_logits,
        backend=backend,
    )[0]


def attend_nothing(data: Data, table, spans, layer) -> jax.Array:
    """An empty kernel in place of the op: what the loop itself costs."""
    del table, spans, layer
    [out] = pl.pallas_call(
        lambda q_ref, out_ref: None,
        out_shape=[jax.ShapeDtypeStruct(data.q.shape, jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=jax.default_backend() != "gpu",
        name="empty",
    )(data.q)
    return out


def expected(sizes: Sizes, data: Data, table, spans, layer) -> jax.Array:
    """The reference's output of the first `sizes.checked` sequences."""
    n = sizes.checked
    spans = {name: x[:n] for name, x in spans.items()}
    return attend(sizes, "reference", data._replace(q=data.q[:n]), table[:n], spans, layer)


def loop(call: Attend, sizes: Sizes, data: Data, table, spans) -> jax.Array:
    """`sizes.steps` calls, layers in turn, each of which needs the one before."""

    def body(i, q):
        # Without the barrier what only lengths decide would be computed once for all calls.
        spans_now, q = jax.lax.optimization_barrier((spans, q))
        out = call(data._replace(q=q), table, spans_now, jax.lax.rem(i, sizes.layers))
        return q + (NOT_VISIBLE * out).astype(q.dtype)

    return jax.lax.fori_loop(0, sizes.steps, body, data.q)


def abstract_inputs(sizes: Sizes) -> tuple[Data, Any, dict]:
    """Shapes of data, table and spans."""
    data = jax.eval_shape(functools.partial(make_data, sizes), jax.random.key(0))
    integer = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    names = ("q_start", "q_lens", "kv_start", "kv_stop")
    return data, integer(sizes.batch, sizes.width), {n: integer(sizes.batch) for n in names}


def program_jobs(problems: list[Problem], args: Args, backend: Backend) -> Jobs:
    """What to compile, by name and sizes: cases of the same sizes share a program."""
    jobs: Jobs = {}

    def add(name, sizes, function, *inputs):
        jobs[name, sizes] = lambda: jax.jit(function).lower(*inputs).compile()

    for problem in problems:
        sizes = problem.sizes
        inputs, layer = abstract_inputs(sizes), jax.ShapeDtypeStruct((), jnp.int32)
        call = jax.jit(functools.partial(attend, sizes, backend))  # traced once for both
        add("attend", sizes, call, *inputs, layer)
        add("loop", sizes, functools.partial(loop, call, sizes), *inputs)
        add("empty", sizes, functools.partial(loop, attend_nothing, sizes), *inputs)
        key = jax.eval_shape(lambda: jax.random.key(0))
        add("data", sizes, functools.partial(make_data, sizes), key)
        if args.check:
            add("expected", sizes, functools.partial(expected, sizes), *inputs, layer)
        if args.peers and jax_peer_refusal(problem) is None:
            for tiling in JAX_TILINGS:
                function = functools.partial(jax_peer, jax_peer_module(), sizes, tiling)
                add(f"jax {tiling}", sizes, function, *jax_peer_inputs(sizes))
    return jobs


def compile_all(jobs: Jobs, log: Console) -> Programs:
    """Compiles in threads, which takes most of a run's time; a future keeps its error."""
    with concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS) as pool:
        programs = {name: pool.submit(job) for name, job in jobs.items()}
        done = concurrent.futures.as_completed(programs.values())
        for _ in track(done, "compiling", total=len(programs), console=log, transient=True):
            pass
    return programs


# Clocks.


class Timing(NamedTuple):
    """Microseconds a call: medians over calls, and the range."""

    us: float
    us_min: float
    us_max: float
    all_us: float | None = None
    kernels: dict[str, float] | None = None  # mean by name


def device_time(calls: list[Callable]) -> Timing | None:
    """Time of the op's own kernels, where some have its name, and of all; None off a GPU."""
    kernels = device_kernels(calls)
    if not kernels:
        return None
    own = [us for _, name, us in kernels if OWN in name]
    every = [us for _, _, us in kernels]
    per_call = _by_call(own or every, len(calls))
    names: dict[str, float] = {}
    for _, name, us in kernels:
        names[name] = names.get(name, 0.0) + us / len(calls)
    return Timing(
        us=float(np.median(per_call)),
        us_min=float(per_call.min()),
        us_max=float(per_call.max()),
        all_us=float(np.median(_by_call(every, len(calls)))),
        kernels={name: round(us, 2) for name, us in names.items()},
    )


def _by_call(us: list[float], calls: int) -> np.ndarray:
    """Sums by call: calls launch the same kernels; where one was lost, the mean."""
    if len(us) % calls:
        return np.full(calls, sum(us) / calls)
    return np.asarray(us).reshape(calls, -1).sum(axis=1)


def wall_times(call: Callable, repeats: int) -> np.ndarray:
    """Microseconds of each call, waited for."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return np.asarray(times) * 1e6


# Ceilings.


class Ceilings(NamedTuple):
    """TB/s, of bytes read, and of bytes read and written."""

    read: float
    copy: float
    read_by: str


READ_TILINGS = ((1024, 2, 1024), (1024, 4, 256), (2048, 4, 512), (2048, 8, 256), (4096, 8, 64))


def read_kernel(x_ref, out_ref, *, block: int, steps: int):
    """Combines `steps` blocks by xor."""
    i = pl.program_id(0)
    body = lambda k, acc: acc ^ x_ref[pl.ds((i * steps + k) * block, block)]
    zeros = jnp.zeros((block,), jnp.uint32)
    out_ref[pl.ds(i * block, block)] = jax.lax.fori_loop(0, steps, body, zeros)


def read_program(size: int, block: int, warps: int, steps: int) -> Callable:
    programs = size // (block * steps)
    return pl.pallas_call(
        functools.partial(read_kernel, block=block, steps=steps),
        out_shape=jax.ShapeDtypeStruct((programs * block,), jnp.uint32),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        name="read",
    )


def measure_ceilings() -> Ceilings:
    """The best of several reductions over 4 GB, and a copy of them."""
    gpu = jax.default_backend() == "gpu"
    size = 2**30 - 2**20 if gpu else 2**24  # 32-bit offsets reach it
    x = jax.jit(lambda: jax.random.bits(jax.random.key(0), (size,), jnp.uint32))()
    readers = {"xla sum": jnp.sum}
    if gpu:
        for tiling in READ_TILINGS:
            readers[f"pallas {tiling}"] = read_program(size, *tiling)

    def speed(function) -> float:
        program = jax.jit(function)
        program(x).block_until_ready()
        calls = [functools.partial(program, x)] * 6
        timing = device_time(calls)
        return (
            4 * size / (np.median(wall_times(calls[0], 6)) if timing is None else timing.us) / 1e6
        )

    speeds = {name: speed(function) for name, function in readers.items()}
    best = max(speeds, key=lambda name: speeds[name])
    return Ceilings(speeds[best], 2 * speed(lambda x: x ^ np.uint32(1)), best)


# Peers. A peer that can't serve a case says why.

JAX_PEER = "jax paged_attention"
TORCH_PEER = "torch SDPA"
JAX_TILINGS = ((1, 4, 2), (2, 4, 2), (2, 8, 3))  # pages a step, warps, stages
PROGRAMS = 1056  # to split sequences for


@functools.cache
def jax_peer_module():
    """JAX's example kernel, which some versions lack."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
        except ImportError:
            return None


def dense_peer_refusal(problem: Problem) -> str | None:
    """Why no peer serves a case."""
    if problem.case.codec != "exact":
        return "bfloat16 alone"
    if jax.default_backend() != "gpu":
        return "needs a GPU"
    return "no learned sinks" if problem.sizes.workload.learned_sinks else None


def jax_peer_refusal(problem: Problem) -> str | None:
    """Why JAX's paged attention does not serve a case; None if it does."""
    if reason := dense_peer_refusal(problem):
        return reason
    if problem.sizes.workload.window is not None:
        return "no window"
    return None if jax_peer_module() else "this JAX has none"


def jax_peer_splits(sizes: Sizes) -> int:
    programs = sizes.batch * sizes.workload.kv_heads
    return pl.next_power_of_2(max(1, -(-PROGRAMS // programs)))


def jax_peer(module, sizes: Sizes, tiling, q, k_pages, v_pages, table, lengths) -> jax.Array:
    """Its output; pools are `[kv_heads, pages, page_size, head_dim]`, the table is filled up."""
    block_pages, warps, stages = tiling
    splits = jax_peer_splits(sizes)
    extra = -table.shape[1] % (splits * block_pages)
    scaled = q[:, 0].astype(jnp.float32) * sizes.workload.head_dim**-0.5  # it does not scale
    out = module.paged_attention(
        scaled.astype(q.dtype),
        k_pages,
        v_pages,
        jnp.pad(table, ((0, 0), (0, extra))),
        lengths,
        pages_per_compute_block=block_pages,
        k_splits=splits,
        num_warps=warps,
        num_stages=stages,
    )
    return out[:, None].astype(jnp.float32)


def jax_peer_inputs(sizes: Sizes) -> tuple:
    data, table, spans = abstract_inputs(sizes)
    shape = sizes.workload
    pool = jax.ShapeDtypeStruct(
        (shape.kv_heads, sizes.pages, sizes.page_size, shape.head_dim), EXACT_DTYPE
    )
    return data.q, pool, pool, table, spans["kv_stop"]


class Checked(NamedTuple):
    """What outputs must be: the reference's, of sequences of some lengths, on the last layer."""

    timed: jax.Array  # at the lengths that are timed
    random: jax.Array  # at random ones


def run_jax_peer(problem: Problem, data: Data, programs, want: Checked | None, args: Args) -> dict:
    """Measures it at its best tiling."""
    sizes, pages = problem.sizes, data.pages
    assert isinstance(pages, ExactPages)
    heads_first = jax.jit(lambda pool, layer: jnp.swapaxes(pool[layer], 0, 1))
    pools = [
        (heads_first(pages.k, layer), heads_first(pages.v, layer)) for layer in range(sizes.layers)
    ]
    table = jnp.asarray(problem.table)
    best, timing, error, refused = "", None, None, ""
    for tiling in JAX_TILINGS:
        try:
            program = programs[f"jax {tiling}", sizes].result()
        except Exception as failure:  # a tiling may not compile: others do
            refused = one_line(failure)
            continue
        lengths = problem.spans(problem.random_lengths())["kv_stop"]
        found = program(data.q, *pools[-1], table, lengths)
        lengths = problem.spans(problem.lengths)["kv_stop"]
        calls = [
            functools.partial(program, data.q, *pools[i % sizes.layers], table, lengths)
            for i in range(args.repeats)
        ]
        jax.block_until_ready([call() for call in calls[:2]])
        now = device_time(calls)
        if now is not None and (timing is None or now.us < timing.us):
            best, timing = f"pages, warps, stages {tiling}", now
            error = None if want is None else relative_error(found, want.random)
    if timing is None:
        raise NotImplementedError(refused or "no device time")
    return make_row(problem, JAX_PEER, timing, None, error) | {"tiling": best}


def torch_peer_refusal(problem: Problem) -> str | None:
    """Why torch's SDPA does not serve a case; None if it may."""
    if reason := dense_peer_refusal(problem):
        return reason
    return "no ragged lengths" if problem.case.ragged else None


def contiguous_keys(problem: Problem, pages: ExactPages, layer: int) -> tuple:
    """Keys and values that are seen, `[batch, kv_heads, tokens, head_dim]`, without pages."""
    size, width = problem.sizes.page_size, problem.sizes.width
    length, window = int(problem.lengths[0]), problem.sizes.workload.window
    start = 0 if window is None else max(0, length - window)
    first, stop = start // size, -(-length // size)
    order = problem.table[:, np.arange(first, stop) % width]

    @jax.jit
    def gather(pool, layer, order):
        x = jnp.swapaxes(pool[layer, order], 1, 2)  # [batch, kv_heads, pages, page_size, head_dim]
        x = x.reshape(*x.shape[:2], -1, x.shape[-1])
        return x[:, :, start - first * size : length - first * size]

    return tuple(gather(pool, layer, jnp.asarray(order)) for pool in (pages.k, pages.v))


def run_torch_peer(problem: Problem, data: Data, want: Checked | None, args: Args) -> dict:
    """Measures SDPA over keys without pages: an upper bound of dense kernels, no paged one."""
    try:
        import torch  # type: ignore[import-not-found]
    except ImportError:
        raise NotImplementedError("torch is not installed") from None
    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    assert isinstance(data.pages, ExactPages)
    sizes, pages = problem.sizes, data.pages
    shared = [contiguous_keys(problem, pages, layer) for layer in range(sizes.layers)]
    q = jnp.swapaxes(data.q, 1, 2)
    jax.block_until_ready((q, shared))
    keys = [tuple(torch.from_dlpack(x) for x in pair) for pair in shared]
    query = torch.from_dlpack(q)
    run = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    times = []
    with torch.inference_mode():
        found = run(query, *keys[-1]).float().transpose(1, 2).cpu().numpy()
        for i in range(args.repeats + 3):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(query, *keys[i % sizes.layers])
            stop.record()
            times.append((start, stop))
        torch.cuda.synchronize()
    us = np.asarray([1e3 * start.elapsed_time(stop) for start, stop in times[3:]])
    timing = Timing(float(np.median(us)), float(us.min()), float(us.max()))
    error = None if want is None else relative_error(jnp.asarray(found), want.timed)
    return make_row(problem, TORCH_PEER, timing, None, error)


# Measuring.


def relative_error(found: jax.Array, want: jax.Array) -> float:
    """Largest over sequences of `|found - want| / |want|`; NaN counts as infinite."""
    found = found[: len(want)]
    norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim))))
    error = float(jnp.max(norm(found - want) / norm(want)))
    return error if np.isfinite(error) else float("inf")


def make_row(
    problem: Problem,
    who: str,
    timing: Timing | None,
    wall_us: np.ndarray | None,
    error: float | None,
) -> dict:
    """One result as plain values; rates follow once the ceiling is known."""
    row: dict[str, Any] = dataclasses.asdict(problem.case)
    row |= {"group": problem.case.group, "by": who, "layers": problem.sizes.layers}
    row |= {"us": None, "us_min": None, "us_max": None, "all_us": None, "kernels": None}
    if timing is not None:
        row |= timing._asdict()
    row["wall_us"] = None if wall_us is None else float(np.median(wall_us))
    row["wall_us_min"] = None if wall_us is None else float(wall_us.min())
    row["wall_us_max"] = None if wall_us is None else float(wall_us.max())
    row["gb"] = problem.read_bytes / 1e9
    row["pool_gb"] = problem.sizes.layers * problem.sizes.layer_bytes / 1e9
    row["error"] = error
    row["ok"] = error is None or error <= MAX_ERROR
    return row


def time_of(row: dict) -> float | None:
    """What counts: the device's time where there is one."""
    return row["wall_us"] if row["us"] is None else row["us"]


def finish_row(row: dict, rows: list[dict], ceilings: Ceilings) -> dict:
    """Adds rates, the fraction of the read ceiling, and how many times faster than exact."""
    us = time_of(row)
    speed = row["gb"] / us * 1e3 if us else None
    row["tb_s"] = speed
    row["fraction"] = speed / ceilings.read if speed else None
    # `layers` is part of `group` where a case asks for many.
    same = (r for r in rows if r["group"] == row["group"] and r["by"] == "jaxkv")
    exact = next((r for r in same if r["codec"] == "exact"), None)
    exact_us = time_of(exact) if exact else None
    row["x_exact"] = exact_us / us if exact_us and us else None
    return row


def measure(
    problem: Problem, programs: Programs, args: Args, note: Callable[[str], None]
) -> Iterable[dict]:
    """Checks and times one case, then its peers: a row each."""
    sizes = problem.sizes
    program = lambda name: programs[name, sizes].result()
    run, loops, empty, make = map(program, ("attend", "loop", "empty", "data"))
    data, table = make(jax.random.key(0)), jnp.asarray(problem.table)
    timed = problem.spans(problem.lengths)
    layers = [jnp.asarray(layer, jnp.int32) for layer in range(sizes.layers)]
    want, error = None, None
    if args.check:
        reference, random = program("expected"), problem.spans(problem.random_lengths())
        want = Checked(*(reference(data, table, spans, layers[-1]) for spans in (timed, random)))
        pairs = zip((timed, random), want, strict=True)
        error = max(relative_error(run(data, table, s, layers[-1]), w) for s, w in pairs)
    repeats = max(3, args.repeats // 2)
    overhead = np.median(wall_times(lambda: empty(data, table, timed), repeats))
    wall = (wall_times(lambda: loops(data, table, timed), repeats) - overhead) / sizes.steps
    calls = [
        functools.partial(run, data, table, timed, layers[i % sizes.layers])
        for i in range(args.repeats)
    ]
    jax.block_until_ready([call() for call in calls[:2]])
    timing = device_time(calls) if jax.default_backend() == "gpu" else None
    yield make_row(problem, "jaxkv", timing, np.maximum(wall, 0), error)
    if not args.peers or problem.case.codec != "exact":
        return
    peers = (
        (JAX_PEER, jax_peer_refusal, lambda: run_jax_peer(problem, data, programs, want, args)),
        (TORCH_PEER, torch_peer_refusal, lambda: run_torch_peer(problem, data, want, args)),
    )
    for name, refusal, run_peer in peers:
        reason = "its case with smaller pools has it" if problem.case.layers else refusal(problem)
        if 2 * sizes.layers * sizes.layer_bytes > args.max_gib * GIB:
            reason = reason or f"a second copy of the pools exceeds --max-gib {args.max_gib:g}"
        try:
            if reason is None:
                yield run_peer()
        except Exception as failure:  # a peer's fault is none of ours
            reason = one_line(failure)
        if reason is not None:
            note(f"{problem.case.group}: no {name}: {reason}")


# Reports.


def print_rows(console: Console, rows: list[dict], ceilings: Ceilings, title: str) -> None:
    """The table of results."""
    number = lambda x, form: "-" if x is None else format(x, form)
    column = lambda name, form: [number(row[name], form) for row in rows]
    spread = lambda row: "-" if row["us"] is None else f"{row['us_min']:.1f}..{row['us_max']:.1f}"
    failed = lambda row: "" if row["ok"] or row["by"] != "jaxkv" else " FAIL"
    columns = {
        "workload": [row["workload"] for row in rows],
        "batch": [str(row["batch"]) for row in rows],
        "context": [_short(row["context"]) + (" ragged" if row["ragged"] else "") for row in rows],
        "codec": [row["codec"] if row["by"] == "jaxkv" else row["by"] for row in rows],
        "us": column("us", ".1f"),
        "spread": [spread(row) for row in rows],
        "all us": column("all_us", ".1f"),
        "wall us": column("wall_us", ".1f"),
        "GB": column("gb", ".3g"),
        "pools\nGB": column("pool_gb", ".1f"),
        "TB/s": column("tb_s", ".3f"),
        "of read\nceiling": column("fraction", ".3f"),
        "x exact": column("x_exact", ".2f"),
        "error": [number(row["error"], ".1e") + failed(row) for row in rows],
    }
    table = make_table(title, columns)
    table.caption = (
        f"us: median of the op's own kernels, by the profiler; all: of every kernel of a call; "
        f"wall: a loop less an empty kernel's; ceiling: {ceilings.read:.3f} TB/s read"
    )
    console.print(table)


def check_plot(plot: str) -> Path:
    """The file to plot to.

    Raises:
      ValueError: no matplotlib, or no such folder.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ValueError(f"--plot {plot}: needs matplotlib ({one_line(error)}).") from None
    path = Path(plot).expanduser()
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot {plot}: must end in one of {', '.join(sorted(known))}.")
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--plot {plot}: must be a file in a folder that exists.")
    return path


def save_plot(path: Path, rows: list[dict], title: str) -> None:
    """A bar a row: its fraction of the read ceiling."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["fraction"] is not None]
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(shown)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names = [row["codec"] if row["by"] == "jaxkv" else row["by"] for row in shown]
    colors = [
        "#9a9a9a" if row["by"] != "jaxkv" else "#1f5fa8" if row["codec"] == "exact" else "#b3541e"
        for row in shown
    ]
    places = range(len(shown))
    bars = axes.barh(places, [row["fraction"] for row in shown], color=colors)
    axes.bar_label(bars, [f"{row['fraction']:.2f}" for row in shown], padding=3, fontsize=8)
    labels = [f"{row['group']}  {name}" for row, name in zip(shown, names, strict=True)]
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("bytes of keys and values a second, as a fraction of the read ceiling")
    axes.set_title(title, fontsize=9)
    figure.savefig(path)


def save_partial(report: dict) -> None:
    """Keeps what is known so far in `$OUT/bench_decode.json`, if there is an OUT."""
    if folder := os.environ.get("OUT"):
        Path(folder, "bench_decode.json").write_text(json.dumps(report))


def main(args: Args) -> int:
    """Measures, prints a table; returns the exit code: 1 where a result is wrong or missing."""
    start = time.perf_counter()
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    check_args(args)
    backend = args.backend or ("gpu" if jax.default_backend() == "gpu" else "xla")
    if backend not in BACKENDS:
        raise ValueError(f"--backend {backend} must be one of {', '.join(BACKENDS)}.")
    if not jax.config.values["jax_compilation_cache_dir"]:
        keep_compiled_programs(cache_folder() / "xla")
    device = jax.devices()[0].device_kind
    console = Console(file=sys.stdout, highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    notes: list[str] = []

    def note(text: str):
        notes.append(text)
        log.print(f"note: {text}")

    problems = []
    for case in list_cases(args):
        try:
            problems.append(make_problem(case, args))
        except ValueError as error:
            note(f"{case.group} {case.codec}: skipped: {one_line(error)}")
    ceilings = measure_ceilings()
    title = (
        f"{device}, jax {jax.__version__}, backend {backend}; ceilings: read "
        f"{ceilings.read:.3f} TB/s ({ceilings.read_by}), copy {ceilings.copy:.3f} TB/s"
    )
    log.print(title)
    programs = compile_all(program_jobs(problems, args, backend), log)
    seconds = lambda: f"{time.perf_counter() - start:.0f} s"
    log.print(f"compiled {len(programs)} programs at {seconds()}")
    rows: list[dict] = []
    report = {
        "device": device,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "backend": backend,
        "page_size": args.page_size,
        "ceilings": ceilings._asdict(),
        "results": rows,
        "notes": notes,
    }
    broken = 0
    for problem in problems:
        name = f"{problem.case.group} {problem.case.codec}"
        try:
            for row in measure(problem, programs, args, note):
                rows.append(row)
                finish_row(row, rows, ceilings)
                us = time_of(row) or float("nan")
                what = problem.case.codec if row["by"] == "jaxkv" else row["by"]
                log.print(
                    f"{problem.case.group} {what}: {us:.1f} us, {row['fraction'] or 0:.3f} of the "
                    f"ceiling, error {row['error']}, at {seconds()}"
                )
        except NotImplementedError as error:
            note(f"{name}: not served: {one_line(error)}")
        except Exception as error:  # the other cases still count; the exit code tells
            if os.environ.get("JAXKV_DEBUG"):
                raise
            broken += 1
            note(f"{name}: FAILED: {type(error).__name__}: {one_line(error)}")
        save_partial(report)
    if rows:
        print_rows(console, rows, ceilings, title)
    for text in notes:
        console.print(text, soft_wrap=True)
    if args.plot and rows:
        save_plot(check_plot(args.plot), rows, title)
    if args.json:
        print(json.dumps(report))
    wrong = [row for row in rows if row["by"] == "jaxkv" and not row["ok"]]
    return 1 if wrong or broken or not rows else 0


if __name__ == "__main__":
    run_command(main, Args)
