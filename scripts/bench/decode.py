"""How near decode attention comes to the memory's speed: real workloads, contexts and codecs.

Correctness first: a result too far from the float32 reference fails the run. Then the kernels' own
device time by the profiler, and beside it the wall time of a loop less that of an empty kernel's.
Bytes are those of the stored keys and values that a query sees (codes, factors, page means), read
once; the ceiling is the best read-only reduction in the same run. Coded caches are measured where
every token is coded: the tokens that a codec keeps exact beside them take one more, short, call.
"""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxkv
from jaxkv.codecs import get_codec
from models.errors import one_line
from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import BACKENDS
from scripts.bench.attend import MAX_ERROR, relative_error
from scripts.bench.cases import GRIDS, SUITES, WORKLOADS, Case, short
from scripts.bench.ceiling import Ceilings, measure_ceilings
from scripts.bench.peers.kernels import Checked, jax_peer_refusal, measure_peers
from scripts.bench.problems import Problem, make_problem
from scripts.bench.programs import Jobs, Programs, attention_jobs, compile_all
from scripts.bench.results import Out, keep_results, make_folder
from scripts.bench.timing import Timing, device_time, wall_times
from scripts.shared.command import print_json, run_command
from scripts.shared.options import Names, Numbers, check_choice, check_least
from scripts.shared.plots import check_plot, plot_fractions
from scripts.shared.tables import format_column, make_table

TABLE_WIDTH = 170  # least, where the output is no terminal
GRID = GRIDS["decode"]


@dataclasses.dataclass
class Args:
    """Measures decode attention: time, bytes per second, fraction of the read ceiling, error.

    Examples:
      decode.py --suite published --plot decode.png --json
      decode.py --workload llama-3-8b --batch 64 --context 8192 --codec exact --codec tq4
      decode.py --workload tiny --batch 2 --context 200
    """

    suite: Literal["published"] | None = None
    """A list of cases by name, in place of the options that choose them; 'published': the table in
    docs/performance.md."""
    workload: Names = ()
    """Model to measure; repeat for several. Default: all but 'tiny', which is for a first try."""
    batch: Numbers = ()
    """Sequences side by side; repeat for several. Default: 1, 8, 64."""
    context: Numbers = ()
    """Tokens of a sequence; repeat for several. Default: 1k, 8k, 32k, 128k."""
    codec: Names = ()
    """Codec, 'exact' is bfloat16; repeat for several. Default: exact, 4bit_nc."""
    ragged: bool = False
    """Draw lengths evenly between an eighth of the context and eleven eighths."""
    page_size: int = 64
    """Tokens per cache page."""
    repeats: int = 16
    """Calls whose median counts."""
    check: bool = True
    """Compare with the reference first."""
    peers: bool = True
    """Also measure JAX's own paged attention and torch's SDPA where they are and serve a case."""
    max_gib: float = 40.0
    """Cases whose pools need more memory are skipped."""
    backend: Literal["gpu", "xla", "reference"] | None = None
    """Implementation of the attention; default: gpu on a GPU, xla elsewhere."""
    plot: str = ""
    """File for a plot of the fractions of the read ceiling; default: no plot."""
    out: Out = None
    """Folder for decode.json, rewritten after each case, so that a run cut short loses none;
    default: none."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def list_cases(args: Args) -> list[Case]:
    """The cases that the arguments choose."""
    if args.suite:
        return list(SUITES[args.suite])
    chosen = dataclasses.replace(
        GRID,
        models=args.workload or GRID.models,
        batches=args.batch or GRID.batches,
        contexts=args.context or GRID.contexts,
        codecs=args.codec or GRID.codecs,
    )
    return chosen.cases(ragged=args.ragged)


def check_args(args: Args) -> None:
    """Raises ValueError, one sentence, for what can't be measured."""
    chosen = ("workload", "batch", "context", "codec", "ragged")
    if args.suite and any(getattr(args, name) for name in chosen):
        raise ValueError(
            f"--suite {args.suite} chooses all cases: leave out --{', --'.join(chosen)}."
        )
    for name in args.workload:
        check_choice("workload", name, WORKLOADS)
    for name in args.codec:
        get_codec(name)
    check_least(args, "batch", "context", "page_size", "repeats")
    for option in ("batch", "context"):
        for value in getattr(args, option):
            if value >= 2**30:
                raise ValueError(f"--{option} {value} must be less than 2**30.")
    if not args.max_gib > 0:
        raise ValueError(f"--max-gib {args.max_gib} must be positive.")
    if args.plot:
        check_plot(args.plot)


def program_jobs(problems: list[Problem], args: Args, backend: Backend) -> Jobs:
    """What to compile, by name and sizes: cases of the same sizes share a program."""
    jobs: Jobs = {}
    for problem in problems:
        peer = args.peers and jax_peer_refusal(problem) is None
        jobs |= attention_jobs(problem.sizes, backend, check=args.check, jax_peer_too=peer)
    return jobs


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
    """The device's time where there is one, else the wall time."""
    return row["wall_us"] if row["us"] is None else row["us"]


def finish_row(row: dict, rows: list[dict], ceilings: Ceilings) -> dict:
    """Adds rates, the fraction of the read ceiling, and how many times faster than exact."""
    us = time_of(row)
    speed = row["gb"] / us * 1e3 if us else None
    row["tb_s"] = speed
    row["fraction"] = speed / ceilings.read if speed else None
    # Cases that differ by their number of layers alone are of different groups.
    same = (r for r in rows if r["group"] == row["group"] and r["by"] == "jaxkv")
    exact = next((r for r in same if r["codec"] == "exact"), None)
    exact_us = time_of(exact) if exact else None
    row["x_exact"] = exact_us / us if exact_us and us else None
    return row


def measure(
    problem: Problem, programs: Programs, args: Args, note: Callable[[str], None]
) -> Iterator[dict]:
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
    yield make_row(problem, "jaxkv", device_time(calls), np.maximum(wall, 0), error)
    if not args.peers or problem.case.codec != "exact":
        return
    peers = measure_peers(problem, data, programs, want, repeats=args.repeats, max_gib=args.max_gib)
    for name, found in peers:
        if isinstance(found, str):
            note(f"{problem.case.group}: no {name}: {found}")
        else:
            yield make_row(problem, name, found.timing, None, found.error) | found.notes


def print_rows(console: Console, rows: list[dict], ceilings: Ceilings, title: str) -> None:
    """The table of results."""
    column = lambda name, form: format_column(rows, name, form, missing="-")
    spread = lambda row: "-" if row["us"] is None else f"{row['us_min']:.1f}..{row['us_max']:.1f}"
    failed = lambda row: "" if row["ok"] or row["by"] != "jaxkv" else " FAIL"
    columns = {
        "workload": column("workload", ""),
        "batch": column("batch", "d"),
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
        "error": [e + failed(row) for e, row in zip(column("error", ".1e"), rows, strict=True)],
    }
    table = make_table(title, columns)
    table.caption = (
        f"us: median of the op's own kernels, by the profiler; all: of every kernel of a call; "
        f"wall: a loop less an empty kernel's; ceiling: {ceilings.read:.3f} TB/s read"
    )
    console.print(table)


def measure_all(
    problems: list[Problem], programs: Programs, args: Args, report: dict, log: Callable
) -> bool:
    """Measures case by case into the report, which is kept after each; True if all went well."""
    rows, ceilings, broken = report["results"], Ceilings(**report["ceilings"]), False

    def note(text: str) -> None:
        report["notes"].append(text)
        log(f"note: {text}")

    for problem in problems:
        name = f"{problem.case.group} {problem.case.codec}"
        try:
            for row in measure(problem, programs, args, note):
                rows.append(row)
                finish_row(row, rows, ceilings)
                who = problem.case.codec if row["by"] == "jaxkv" else row["by"]
                log(
                    f"{problem.case.group} {who}: {time_of(row) or float('nan'):.1f} us, "
                    f"{row['fraction'] or 0:.3f} of the ceiling, error {row['error']}"
                )
        except NotImplementedError as error:
            note(f"{name}: not served: {one_line(error)}")
        except Exception as error:  # the other cases still count; the exit code tells
            if os.environ.get("JAXKV_DEBUG"):
                raise
            broken = True
            note(f"{name}: FAILED: {type(error).__name__}: {one_line(error)}")
        keep_results(args.out, "decode", report)
    return not broken


def main(args: Args) -> int:
    """Measures, prints a table; returns the exit code: 1 where a result is wrong or missing."""
    start = time.perf_counter()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    log = lambda text: console.print(f"{time.perf_counter() - start:4.0f} s: {text}")
    check_args(args)
    make_folder(args.out)
    backend = args.backend or ("gpu" if jax.default_backend() == "gpu" else "xla")
    if backend not in BACKENDS:
        raise ValueError(f"--backend {backend} must be one of {', '.join(BACKENDS)}.")
    jaxkv.keep_compiled_programs()
    notes: list[str] = []
    problems = []
    for case in list_cases(args):
        try:
            problems.append(make_problem(case, page_size=args.page_size, max_gib=args.max_gib))
        except ValueError as error:
            notes.append(f"{case.group} {case.codec}: skipped: {one_line(error)}")
            log(f"note: {notes[-1]}")
    ceilings = measure_ceilings()
    device = jax.devices()[0].device_kind
    title = (
        f"{device}, jax {jax.__version__}, backend {backend}; ceilings: read "
        f"{ceilings.read:.3f} TB/s ({ceilings.read_by}), copy {ceilings.copy:.3f} TB/s"
    )
    log(title)
    programs = compile_all(program_jobs(problems, args, backend), console)
    log(f"compiled {len(programs)} programs")
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
    went_well = measure_all(problems, programs, args, report, log)
    output = Console(file=sys.stdout, highlight=False)
    output.width = max(output.width, TABLE_WIDTH)
    if rows:
        print_rows(output, rows, ceilings, title)
    for text in notes:
        output.print(text, soft_wrap=True)
    if args.plot and rows:
        plot_fractions(check_plot(args.plot), rows, title)
    if args.json:
        print_json(report)
    right = all(row["ok"] for row in rows if row["by"] == "jaxkv")
    return 0 if rows and went_well and right else 1


if __name__ == "__main__":
    run_command(main, Args)
