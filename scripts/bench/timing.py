"""Times of a GPU's kernels, by JAX's profiler, and of calls that are waited for."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

OWN = "paged_attention"  # in the name of each attention kernel; work list and rotations are not


def device_kernels(calls: list[Callable]) -> list[tuple[float, str, float]]:
    """Start, name and microseconds of every kernel that the calls ran, in order.

    Empty where the profiler sees no GPU.
    """
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
