"""Times of a GPU's kernels by JAX's profiler, and of calls that are waited for."""

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

OWN = "paged_attention"  # in the name of each attention kernel; work list and rotations lack it
ATTENTION = (OWN, "plan_work", "rotate_rows")  # in the names of all that attention launches
GEMMS = ("gemm", "cutlass", "nvjet", "cublas", "splitK", "dot")

Kernels = list[tuple[float, str, float]]  # start, name and microseconds of each, in order


def device_kernels(calls: Sequence[Callable]) -> Kernels:
    """Runs the calls under the profiler; every kernel that they ran, or none without a GPU."""
    if jax.default_backend() != "gpu":
        return []
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready([call() for call in calls][-1])
        [path] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        kernels = [
            (event.start_ns, event.name, event.duration_ns / 1e3)
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return sorted(kernels)


class Timing(NamedTuple):
    """Microseconds per call: the median over calls, and the range."""

    us: float
    us_min: float
    us_max: float
    all_us: float | None = None  # of every kernel that a call runs, the op's own and others
    kernels: dict[str, float] | None = None  # mean per call, by name


def device_time(calls: Sequence[Callable]) -> Timing | None:
    """Times the kernels that the calls run.

    Returns:
      Times of the op's own kernels, or of all if none has the op's name; None without a GPU.
    """
    kernels = device_kernels(calls)
    if not kernels:
        return None
    own = [us for _, name, us in kernels if OWN in name]
    every = [us for _, _, us in kernels]
    names: dict[str, float] = {}
    for _, name, us in kernels:
        names[name] = names.get(name, 0.0) + us / len(calls)
    return _summarize(_by_call(own or every, len(calls)))._replace(
        all_us=float(np.median(_by_call(every, len(calls)))),
        kernels={name: round(us, 2) for name, us in names.items()},
    )


def _by_call(us: list[float], calls: int) -> np.ndarray:
    """Sums per call, as all calls launch the same kernels; the mean if the profiler lost one."""
    if len(us) % calls:
        return np.full(calls, sum(us) / calls)
    return np.asarray(us).reshape(calls, -1).sum(axis=1)


def _summarize(us: np.ndarray) -> Timing:
    return Timing(us=float(np.median(us)), us_min=float(us.min()), us_max=float(us.max()))


def timed(call: Callable) -> tuple[float, Any]:
    """Seconds until the call's result was ready, and the result."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def wall_times(call: Callable, repeats: int) -> np.ndarray:
    """Microseconds of each of `repeats` calls that are waited for, after one that warms up."""
    return 1e6 * np.asarray([timed(call)[0] for _ in range(repeats + 1)][1:])


def time_calls(calls: Sequence[Callable]) -> Timing:
    """The device's time of the calls; without a GPU the wall time of the first, called as often."""
    return device_time(calls) or _summarize(wall_times(calls[0], len(calls)))


def spread(seconds: Sequence[float]) -> float | None:
    """The range of the times as a fraction of their median; None for a single time."""
    if len(seconds) < 2:
        return None
    return float(np.ptp(seconds) / np.median(seconds))


def time_by_kind(kernels: Kernels) -> dict[str, float]:
    """Milliseconds of all kernels of attention, of matrix products ("weights") and of the rest.

    Empty where the profiler saw no kernels: on a CPU.
    """
    if not kernels:
        return {}
    times: dict[str, float] = dict.fromkeys(("attention", "weights", "rest"), 0.0)
    for _, name, us in kernels:
        times[_kind(name)] += us / 1e3
    return times


def _kind(kernel: str) -> str:
    if any(name in kernel for name in ATTENTION):
        return "attention"
    return "weights" if any(name in kernel for name in GEMMS) else "rest"


def list_kernels(kernels: Kernels, steps: int, most: int) -> dict[str, list[str]]:
    """Columns of a table: launches and microseconds per step of `most` kinds, the longest first.

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
