"""Searches the GPU decode kernel's tile sizes for one case: the best ones for `choose_config`.

It starts at the default, tries the values of one field at a time, keeps a faster one, and goes
round again. Pages hold random words, since no tile size depends on their meaning; each setting's
output is compared with the reference's before it is timed.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxkv.codecs import get_codec
from models.errors import one_line
from pallas_kernels.paged_attention.triton.tile_sizes import DecodeConfig
from scripts.bench.attend import (
    MAX_ERROR,
    attend_tiled,
    default_tiles,
    expected,
    relative_error,
)
from scripts.bench.cases import GRIDS, WORKLOADS, Case
from scripts.bench.fill import random_data
from scripts.bench.problems import make_problem
from scripts.bench.programs import compile_all
from scripts.bench.timing import time_calls
from scripts.shared.command import print_json, run_command
from scripts.shared.options import Names, check_choice, check_least
from scripts.shared.tables import make_table

GRID = GRIDS["tune"]
GAIN = 0.99  # a better setting takes less than this part of the best time: the rest is noise
# In the order in which they are tried, each with the best values found so far of the others.
VALUES: dict[str, tuple] = {
    "at_once": (2, 3, 4, 8, 12),
    "waves": (1, 2, 3),
    "stages": (2, 3, 4),
    "block": (32, 64, 128),
    "warps": (1, 2, 4, 8),
    "early_factors": (False, True),
    "lookups": ("kv", "k", "v", ""),
    "mask_all": (False, True),
    "transposed": (False, True),
}


@dataclasses.dataclass
class Args:
    """Searches the decode kernel's tile sizes for one case, on the GPU that is there.

    Examples:
      tune.py --workload llama-3-8b --batch 64 --context 8192 --codec tq4
      tune.py --codec exact --batch 1 --context 131072 --field at_once --field waves
    """

    workload: str = GRID.models[0]
    """Model's heads and window, as in decode.py."""
    batch: int = GRID.batches[0]
    """Sequences side by side."""
    context: int = GRID.contexts[0]
    """Tokens of each."""
    codec: str = GRID.codecs[0]
    """Codec of the pages."""
    page_size: int = 64
    """Tokens per page."""
    field: Names = ()
    """Field of DecodeConfig to vary; repeat for several. Default: all that are known to matter."""
    rounds: int = 2
    """Most rounds through the fields; it ends when a round finds nothing."""
    repeats: int = 8
    """Calls whose median counts."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


class Tuning:
    """The case that is tuned: random pages, the right output, and the result of each setting."""

    def __init__(self, args: Args):
        case = Case(
            workload=args.workload, batch=args.batch, context=args.context, codec=args.codec
        )
        # Pages are laid out for the kernel on a CPU, too, where it is interpreted.
        problem = make_problem(case, page_size=args.page_size, platform="gpu")
        self.sizes, self.repeats = problem.sizes, args.repeats
        self.inputs = (
            random_data(self.sizes),
            jnp.asarray(problem.table),
            problem.spans(problem.lengths),
        )
        layer = jnp.int32(self.sizes.layers - 1)
        reference = jax.jit(functools.partial(expected, self.sizes))
        self.want = reference(*self.inputs, layer)
        self.results: dict[DecodeConfig, dict] = {}

    def default(self) -> DecodeConfig:
        """The tile sizes that the kernel takes by itself."""
        return default_tiles(self.sizes, self.inputs[0])

    def compile(self, config: DecodeConfig):
        """The op with these tile sizes; it takes the inputs, then a layer."""
        call = functools.partial(attend_tiled, self.sizes, config)
        return jax.jit(call).lower(*self.inputs, jnp.int32(0)).compile()

    def measure(self, configs: list[DecodeConfig], log: Console) -> None:
        """Adds to `results`: microseconds and error, or why there are none."""
        new = [config for config in dict.fromkeys(configs) if config not in self.results]
        jobs = {config: functools.partial(self.compile, config) for config in new}
        for config, program in compile_all(jobs, log).items():
            try:
                self.results[config] = self._measure(program.result())
            except Exception as error:  # a setting may not compile: others do
                self.results[config] = {"us": float("inf"), "why": one_line(error, 60)}

    def _measure(self, program) -> dict:
        layers = self.sizes.layers
        out = program(*self.inputs, jnp.int32(layers - 1))[: self.sizes.checked]
        error = relative_error(out, self.want)
        if not error <= MAX_ERROR:
            return {"us": float("inf"), "error": error, "why": "wrong"}
        calls = [
            functools.partial(program, *self.inputs, jnp.int32(i % layers))
            for i in range(self.repeats)
        ]
        return {"us": time_calls(calls).us, "error": error}


def neighbours(config: DecodeConfig, field: str) -> Iterator[DecodeConfig]:
    """The config with the field's other values; no program gets less than a block."""
    for value in VALUES[field]:
        if value == getattr(config, field):
            continue
        changed = dataclasses.replace(config, **{field: value})
        least = max(changed.block, changed.least_tokens)
        yield dataclasses.replace(changed, least_tokens=least)


def difference(config: DecodeConfig, base: DecodeConfig) -> str:
    """The fields that differ."""
    names = [field.name for field in dataclasses.fields(config)]
    changed = [name for name in names if getattr(config, name) != getattr(base, name)]
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in changed) or "default"


def search(tuning: Tuning, fields: tuple[str, ...], rounds: int, log: Console) -> DecodeConfig:
    """Measures settings around the best one until a round finds nothing; returns the best."""
    us = lambda config: tuning.results[config]["us"]
    default = best = tuning.default()
    tuning.measure([default], log)
    log.print(f"{default}: {tuning.results[default]}")
    for _ in range(rounds):
        before = best
        for field in fields:
            near = list(neighbours(best, field))
            tuning.measure(near, log)
            found = min(near, key=us, default=best)
            if us(found) < GAIN * us(best):
                best = found
                log.print(f"{us(best):8.1f} us: {difference(best, default)}")
        if best == before:
            break
    return best


def main(args: Args) -> int:
    """Searches, prints every setting tried; returns 1 if the default itself fails."""
    log = Console(stderr=True, highlight=False)
    get_codec(args.codec)
    check_choice("workload", args.workload, WORKLOADS)
    for name in args.field:
        check_choice("field", name, VALUES)
    check_least(args, "batch", "context", "page_size", "rounds", "repeats")
    tuning = Tuning(args)
    default = tuning.default()
    best = search(tuning, args.field or tuple(VALUES), args.rounds, log)
    tried = sorted(tuning.results, key=lambda config: tuning.results[config]["us"])
    rows = [tuning.results[config] for config in tried]
    columns = {
        "setting": [difference(config, default) for config in tried],
        "us": [f"{row['us']:.1f}" for row in rows],
        "error": [f"{row['error']:.1e}" if "error" in row else "" for row in rows],
        "": [row.get("why", "") for row in rows],
    }
    name = f"{args.workload}, batch {args.batch}, {args.context} tokens, {args.codec}"
    title = f"{name}, {jax.devices()[0].device_kind}"
    Console(file=sys.stdout, highlight=False).print(make_table(title, columns))
    if args.json:
        settings = [{"setting": difference(c, default)} | tuning.results[c] for c in tried]
        print_json({"case": name, "best": difference(best, default), "tried": settings})
    return int(not np.isfinite(tuning.results[default]["us"]))


if __name__ == "__main__":
    run_command(main, Args)
