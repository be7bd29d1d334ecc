"""Times of a GPU's kernels, by JAX's profiler."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax


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
