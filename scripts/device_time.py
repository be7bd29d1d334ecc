"""Times of a GPU's kernels, by JAX's profiler."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import jax


def device_times(calls: Iterable[Callable]) -> dict[str, list[float]]:
    """Microseconds of every kernel that `calls` run, by name, in order; empty without a GPU.

    What a call returns must become ready when its kernels are done.
    """
    times = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for call in calls:
                jax.block_until_ready(call())
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            times[event.name].append(event.duration_ns / 1e3)
    return dict(times)
