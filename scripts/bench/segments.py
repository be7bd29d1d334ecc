"""What sinks, windows and recent pages add to coded attention: one layer, through the cache.

A cache reads exact pages (sinks, the newest) and coded ones, and merges the two. Each codec is
measured as plainly as it can be kept, and with everything together, and compared by the cost per
byte that the query sees. Results are checked against the float32 reference first.
"""

import dataclasses
import functools
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxkv
from jaxkv.codecs import get_codec
from scripts.bench.attend import MAX_ERROR, relative_error
from scripts.bench.cases import GRIDS, WORKLOADS, Workload
from scripts.bench.fill import random_cache
from scripts.bench.timing import time_calls
from scripts.shared.command import print_json, run_command
from scripts.shared.options import Names, check_choice, check_least
from scripts.shared.progress import working
from scripts.shared.tables import format_column, make_table

GRID = GRIDS["segments"]


@dataclasses.dataclass
class Args:
    """Measures attention through the cache, plain and with sinks, window and recent pages.

    Examples:
      segments.py
      segments.py --codec tq4 --context 32768 --window 4096
      segments.py --workload tiny --batch 2 --context 300
    """

    workload: str = GRID.models[0]
    """Model whose heads are taken, as in decode.py; its window is --window's default."""
    codec: Names = ()
    """Codec of the pages; repeat for several. Default: 4bit_nc, tq4."""
    batch: int = GRID.batches[0]
    """Sequences side by side."""
    context: int = GRID.contexts[0]
    """Tokens of each."""
    window: int | None = None
    """Tokens that a query sees, besides sinks."""
    sink_tokens: int = 4
    """First tokens that stay visible beside the window."""
    recent_pages: int = 2
    """Newest pages that stay exact."""
    page_size: int = 64
    """Tokens per cache page."""
    repeats: int = 16
    """Calls whose median counts."""
    backend: Literal["gpu", "xla"] | None = None
    """Implementation of the attention; default: what `jaxkv.explain` says."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def layer_spec(args: Args, shape: Workload, codec: str, *, together: bool) -> jaxkv.LayerSpec:
    """A layer with all of the segments, or with as few as the codec allows."""
    store = get_codec(codec)
    least = 1 if store.key_mean == "page" else 0  # a mean needs a whole page
    store = dataclasses.replace(
        store,
        recent_pages=max(least, args.recent_pages if together else 0),
        sink_tokens=args.sink_tokens if together else 0,
    )
    return jaxkv.LayerSpec(
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        window=shape.window if args.window is None else args.window,
        sink_tokens=args.sink_tokens if together else 0,
        codec=store,
    )


def visible_bytes(config: jaxkv.CacheConfig, length: int) -> float:
    """Stored bytes that a query at position `length` sees, of one sequence and the only layer."""
    [group], page_size = config.groups, config.page_size
    spec = group.spec
    position = np.arange(length + 1)
    seen = position < spec.sink_tokens
    seen |= position > length - (length + 1 if spec.window is None else spec.window)
    coded = np.zeros_like(seen)
    if group.coded:
        span = config.stores_of(group)[-1].span
        # Unless complete pages alone are coded, the step's own token is coded as it comes.
        reached = length if span.complete else length + 1
        first = int(span.first_page(jnp.int32(length)))
        stop = int(span.stop_page(jnp.int32(reached)))
        coded = (position // page_size >= first) & (position // page_size < stop)
    exact = 2 * spec.kv_heads * spec.head_dim * jnp.dtype(spec.dtype).itemsize
    body = spec.kv_heads * spec.kv_codec.page_bytes(spec.head_dim, page_size) / page_size
    return float((seen & ~coded).sum() * exact + (seen & coded).sum() * body)


def attend(
    cache: jaxkv.KVCache, q, k, v, sink_logits, *, backend
) -> tuple[jax.Array, jaxkv.KVCache]:
    """One token of every sequence; the cache is left as it was."""
    ones = jnp.ones(q.shape[0], jnp.int32)
    cache, out = cache.prepare(ones).attend(0, q, k, v, sink_logits=sink_logits, backend=backend)
    return out, cache.commit(0 * ones)


def measure(args: Args, shape: Workload, spec: jaxkv.LayerSpec, *, together: bool) -> dict:
    """Checks, then times one case."""
    config = jaxkv.CacheConfig(
        layers=(spec,),
        batch=args.batch,
        max_tokens=args.context + args.page_size,
        max_new_tokens=args.page_size,
        page_size=args.page_size,
    ).checked()
    cache = random_cache(config, args.context)
    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda key, *dims: jax.random.normal(key, dims).astype(spec.dtype)
    # Outputs have the dtype of the queries: float32, so that rounding does not hide an error.
    q = normal(keys[0], args.batch, 1, shape.q_heads, shape.head_dim).astype(jnp.float32)
    k, v = (normal(key, args.batch, 1, shape.kv_heads, shape.head_dim) for key in keys[1:3])
    sinks = jax.random.normal(keys[3], (shape.q_heads,)) if together else None
    step = lambda backend: functools.partial(attend, backend=backend)
    want, _ = jax.jit(step("reference"))(cache, q, k, v, sinks)
    run = jax.jit(step(args.backend), donate_argnums=0)
    found, cache = run(cache, q, k, v, sinks)
    error = relative_error(found, want)

    def call():
        nonlocal cache
        out, cache = run(cache, q, k, v, sinks)
        return out

    jax.block_until_ready(call())
    timing = time_calls([call] * args.repeats)
    seen = args.batch * visible_bytes(config, args.context)
    row = dict(timing._asdict(), mb=seen / 1e6, error=error, together=together)
    return row | {"us_per_mb": timing.us / row["mb"], "ok": error <= MAX_ERROR}


def measure_both(args: Args, shape: Workload, codec: str) -> list[dict]:
    """Measures a codec plainly and with everything together."""
    rows = []
    for together in (False, True):
        spec = layer_spec(args, shape, codec, together=together).checked()
        row: dict[str, Any] = {"codec": codec}
        row |= measure(args, shape, spec, together=together)
        plain = rows[0] if together else row
        row["more_a_byte"] = row["us_per_mb"] / plain["us_per_mb"] - 1
        rows.append(row)
    return rows


def show(rows: list[dict], title: str) -> None:
    """Prints the table."""
    number = functools.partial(format_column, rows, missing="-")
    errors = zip(number("error", ".1e"), rows, strict=True)
    columns = {
        "codec": number("codec", ""),
        "": ["together" if row["together"] else "plain" for row in rows],
        "MB seen": number("mb", ".1f"),
        "us": number("us", ".1f"),
        "all us": number("all_us", ".1f"),
        "more\nper byte": number("more_a_byte", "+.1%"),
        "error": [error + ("" if row["ok"] else " FAIL") for error, row in errors],
    }
    Console(file=sys.stdout, highlight=False).print(make_table(title, columns))


def main(args: Args) -> int:
    """Measures every codec both ways, prints a table; returns 1 where a result is wrong."""
    check_choice("workload", args.workload, WORKLOADS)
    check_least(args, "batch", "context", "page_size", "repeats")
    check_least(args, "sink_tokens", "recent_pages", least=0)
    codecs = args.codec or GRID.codecs
    for name in codecs:
        if not get_codec(name).lossy:
            raise ValueError(f"--codec {name}: an exact cache has no coded pages.")
    log = Console(stderr=True, highlight=False)
    shape = WORKLOADS[args.workload]
    rows: list[dict] = []
    for codec in codecs:
        with working(log, f"{codec}: checking, measuring"):
            rows += measure_both(args, shape, codec)
        log.print(f"{codec}: plain {rows[-2]['us']:.1f} us, together {rows[-1]['us']:.1f} us")
    about = f"{args.workload}, batch {args.batch}, {args.context} tokens"
    window = shape.window if args.window is None else args.window
    if window is not None:
        about += f", window {window}"
    device = jax.devices()[0].device_kind
    show(rows, f"{about}, {device}")
    if args.json:
        print_json({"case": about, "device": device, "results": rows})
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    run_command(main, Args)
