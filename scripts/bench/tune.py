"""Tile sizes of the GPU decode kernel for one case: what `gpu_tiles.choose_config` should say.

It goes from the default one field at a time, keeps what is faster, and goes round again. Pages hold
random words, since no tile size hangs on what they mean; each setting's output is compared with the
reference's before it is timed.
"""

import concurrent.futures
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from jaxkv.codecs import get_codec
from pallas_kernels.paged_attention import gpu_decode
from pallas_kernels.paged_attention.gpu_tiles import DecodeConfig
from pallas_kernels.segments import add_learned_sink
from pallas_kernels.visibility import seen_span
from scripts.bench import problems
from scripts.bench.problems import (
    MAX_ERROR,
    WORKLOADS,
    Data,
    Sizes,
    expected,
    make_data,
    make_problem,
    relative_error,
)
from scripts.bench.step import fill_pages
from scripts.bench.timing import device_time, wall_times
from scripts.plan import make_table
from scripts.shared.command import run_command

COMPILE_THREADS = 12
GAIN = 0.99  # of the best time: what is nearer is noise
# In the order in which they are tried; each beside what the others are by then.
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
Fields = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FIELD")]


@dataclasses.dataclass
class Args:
    """Searches the decode kernel's tile sizes for one case, on the GPU that is there.

    Examples:
      tune.py --workload llama-3-8b --batch 64 --context 8192 --codec tq4
      tune.py --codec exact --batch 1 --context 131072 --field at_once --field waves
    """

    workload: str = "llama-3-8b"
    """Model's heads and window, as in decode.py."""
    batch: int = 64
    """Sequences side by side."""
    context: int = 8192
    """Tokens of each."""
    codec: str = "exact"
    """How pages are kept."""
    page_size: int = 64
    """Tokens a page."""
    field: Fields = ()
    """Field of DecodeConfig to vary; repeat for several. Default: all that are worth it."""
    rounds: int = 2
    """Most times through the fields; it ends when a round finds nothing."""
    repeats: int = 8
    """Calls whose median counts."""
    json: bool = False
    """Last line of standard output: one JSON object."""


class Case:
    """What is tuned: random pages, and what each setting must give."""

    def __init__(self, args: Args):
        case = problems.Case(
            workload=args.workload, batch=args.batch, context=args.context, codec=args.codec
        )
        # Also on a CPU, where the kernel is interpreted, pages are laid out for it.
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
        """What the kernel takes by itself."""
        shape = self.sizes.workload
        pages, rows = self.inputs[0].pages, shape.q_heads // shape.kv_heads
        return gpu_decode.default_config(pages, rows=rows, window=shape.window)

    def compile(self, config: DecodeConfig):
        """The op with these tile sizes; inputs, then a layer."""
        call = functools.partial(attend, self.sizes, config)
        return jax.jit(call).lower(*self.inputs, jnp.int32(0)).compile()

    def measure(self, configs: list[DecodeConfig]) -> None:
        """Fills in `results`: microseconds and error, or why there are none."""
        configs = [config for config in dict.fromkeys(configs) if config not in self.results]
        with concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS) as pool:
            programs = [pool.submit(self.compile, config) for config in configs]
        for config, program in zip(configs, programs, strict=True):
            try:
                self.results[config] = self._measure(program.result())
            except Exception as error:  # a setting may not compile: others do
                self.results[config] = {"us": float("inf"), "why": str(error).split("\n")[0][:60]}

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
        timing = device_time(calls)
        wall = lambda: float(np.median(wall_times(calls[0], self.repeats)))
        return {"us": wall() if timing is None else timing.us, "error": error}


def random_data(sizes: Sizes) -> Data:
    """A case's inputs with random words for pages."""
    shapes = jax.eval_shape(functools.partial(make_data, sizes), jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.pages)
    normal = lambda x: jax.random.normal(jax.random.key(1), x.shape, jnp.float32).astype(x.dtype)
    sinks = None if shapes.sink_logits is None else normal(shapes.sink_logits)
    return Data(normal(shapes.q), fill_pages(zeros), sinks)


def attend(sizes: Sizes, config: DecodeConfig, data: Data, table, spans, layer) -> jax.Array:
    """Like `problems.attend`, with tile sizes."""
    shape = sizes.workload
    spans = dict(spans)
    names = ("q_start", "q_lens", "kv_start", "kv_stop")
    spans["kv_start"], spans["kv_stop"] = seen_span(
        *(spans[name] for name in names), window=shape.window, sink_tokens=0
    )
    out, lse = gpu_decode.paged_attention(
        data.q,
        data.pages,
        table,
        layer=layer,
        **spans,
        scale=shape.head_dim**-0.5,
        window=shape.window,
        sink_tokens=0,
        lag=None,
        soft_cap=None,
        out_dtype=jnp.float32,
        interpret=jax.default_backend() != "gpu",
        config=config,
    )
    if data.sink_logits is not None:
        out, _ = add_learned_sink(out, lse, data.sink_logits)
    return out


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


def main(args: Args) -> int:
    """Searches, prints every setting tried; returns 1 if the default itself fails."""
    log = Console(stderr=True, highlight=False)
    get_codec(args.codec)
    if args.workload not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        raise ValueError(f"--workload {args.workload!r} must be one of {known}.")
    for name in args.field:
        if name not in VALUES:
            raise ValueError(f"--field {name!r} must be one of {', '.join(VALUES)}.")
    for name in ("batch", "context", "page_size", "rounds", "repeats"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(args, name)} must be at least 1.")
    case = Case(args)
    default = best = case.default()
    case.measure([default])
    us = lambda config: case.results[config]["us"]
    log.print(f"{default}: {case.results[default]}")
    for _ in range(args.rounds):
        before = best
        for field in args.field or VALUES:
            near = list(neighbours(best, field))
            case.measure(near)
            found = min(near, key=us, default=best)
            if us(found) < GAIN * us(best):
                best = found
                log.print(f"{us(best):8.1f} us: {difference(best, default)}")
        if best == before:
            break
    tried = sorted(case.results, key=us)
    rows = [case.results[config] for config in tried]
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
        settings = [{"setting": difference(c, default)} | case.results[c] for c in tried]
        print(json.dumps({"case": name, "best": difference(best, default), "tried": settings}))
    return int(not np.isfinite(us(default)))


if __name__ == "__main__":
    run_command(main, Args)
