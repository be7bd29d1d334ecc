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
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from rich.console import Console
from rich.progress import track

from jaxkv.codecs import get_codec
from models.checkpoints.errors import one_line
from models.smollm2 import cache_folder
from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import BACKENDS
from scripts.bench.ceiling import Ceilings, measure_ceilings
from scripts.bench.peers.kernels import (
    JAX_PEER,
    JAX_TILINGS,
    TORCH_PEER,
    Checked,
    jax_peer,
    jax_peer_inputs,
    jax_peer_module,
    jax_peer_refusal,
    run_jax_peer,
    run_torch_peer,
    torch_peer_refusal,
)
from scripts.bench.problems import (
    MAX_ERROR,
    WORKLOADS,
    Case,
    Data,
    Problem,
    Sizes,
    abstract_inputs,
    attend,
    expected,
    make_data,
    make_problem,
    relative_error,
    short,
)
from scripts.bench.timing import Timing, device_time, wall_times
from scripts.plan import GIB, make_table
from scripts.shared.command import keep_compiled_programs, run_command

COMPILE_THREADS = 12
TABLE_WIDTH = 170  # least, where the output is no terminal
NOT_VISIBLE = 1e-30  # times an output, added to a query: depends on it, changes nothing
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
      decode.py --suite issue --plot decode.png --json
      decode.py --workload llama-3-8b --batch 64 --context 8192 --codec exact --codec tq4
      decode.py --workload tiny --batch 2 --context 200
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


# Programs: all are compiled for shapes alone, before any data is there.

Attend = Callable[..., jax.Array]
Jobs = dict[tuple[str, Sizes], Callable]  # by name
Programs = dict[tuple[str, Sizes], concurrent.futures.Future]


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


def loop(call: Attend, sizes: Sizes, data: Data, table, spans) -> jax.Array:
    """`sizes.steps` calls, layers in turn, each of which needs the one before."""

    def body(i, q):
        # Without the barrier what only lengths decide would be computed once for all calls.
        spans_now, q = jax.lax.optimization_barrier((spans, q))
        out = call(data._replace(q=q), table, spans_now, jax.lax.rem(i, sizes.layers))
        return q + (NOT_VISIBLE * out).astype(q.dtype)

    return jax.lax.fori_loop(0, sizes.steps, body, data.q)


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


# Measuring.


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
        (
            JAX_PEER,
            jax_peer_refusal,
            lambda: run_jax_peer(problem, data, programs, want, args.repeats),
        ),
        (TORCH_PEER, torch_peer_refusal, lambda: run_torch_peer(problem, data, want, args.repeats)),
    )
    for name, refusal, run_peer in peers:
        reason = "its case with smaller pools has it" if problem.case.layers else refusal(problem)
        if 2 * sizes.layers * sizes.layer_bytes > args.max_gib * GIB:
            reason = reason or f"a second copy of the pools exceeds --max-gib {args.max_gib:g}"
        try:
            if reason is None:
                timing, error, notes = run_peer()
                yield make_row(problem, name, timing, None, error) | notes
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
        "context": [short(row["context"]) + (" ragged" if row["ragged"] else "") for row in rows],
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
            problems.append(make_problem(case, page_size=args.page_size, max_gib=args.max_gib))
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
