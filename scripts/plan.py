"""Bytes of a model's KV cache by codec, and how much fits into memory, before anything is loaded.

Reads the model's config alone. All numbers come from `jaxkv.plan`, which is exact to the byte.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rich.console import Console

import jaxkv
import models
from jaxkv.codecs import KVCodec, codec_names
from jaxkv.config import LayerGroup
from models.families.architectures import architecture_config
from models.json_files import read_json_object
from scripts.shared.command import print_json, run_command
from scripts.shared.keep import CodecsOptions
from scripts.shared.options import GIB
from scripts.shared.tables import make_table

MOST = 2**31 - 1  # positions and page numbers are int32


@dataclasses.dataclass
class Args:
    """Prints what a KV cache takes for each codec, and what fits into --memory.

    Examples:
      plan.py --model smollm2 --memory 0.5
      plan.py --model path/to/folder --codec exact --codec tq3 --batch 8 --tokens 32768
      plan.py --model path/to/config.json --codec tq4 --window 1024 --sink-tokens 4 --groups
    """

    model: str = "smollm2"
    """'smollm2', a GGUF file, a Hugging Face folder (no weights needed) or its config.json."""
    keep: CodecsOptions = CodecsOptions()
    memory: float = 8.0
    """GiB for the cache alone: the model's weights come on top."""
    batch: int = 1
    """Sequences side by side."""
    tokens: int | None = None
    """Tokens of each sequence; default: the model's trained context."""
    page_size: int = 64
    """Tokens per cache page."""
    max_new_tokens: int = 1
    """Most tokens that one step adds to a sequence (prefill chunk, drafts)."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Float type of exact pages."""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Platform whose kernels read the cache; default: this machine's."""
    groups: bool = False
    """Also print each group of layers; always done for a single codec."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The memory that one codec takes."""

    codec: str
    bits_per_value: float  # layers averaged, exact tokens left out
    bytes_per_token: float  # of one more token in a long sequence, all layers
    cache_bytes: int
    compression: float  # against exact pages of the same dtype
    max_tokens: int | None  # of each sequence, in --memory; None: no limit
    max_sequences: int  # of --tokens tokens, in --memory
    config: jaxkv.CacheConfig


def read_config(model: str, say: Callable[[str], None]) -> models.DecoderConfig:
    """The architecture of a name, GGUF file, folder or config.json; reads no weights."""
    path = Path(model).expanduser()
    if model not in models.NAMES:
        path = path / "config.json" if path.is_dir() else path
        if path.suffix == ".json":
            return architecture_config(read_json_object(path))
    return architecture_config(models.open_checkpoint(model, say=say).config)


def largest(fits: Callable[[int], bool], guess: int, step: int) -> int:
    """Largest n in 0..MOST with `fits(n)`, which is monotone; 0 if 1 does not fit.

    Gallops away from the guess before it bisects: near a good guess few calls are enough.
    """
    low = high = min(max(guess, 1), MOST)
    stride = step
    while low > 0 and not fits(low):
        low, high, stride = max(low - stride, 0), low, 2 * stride
    while high <= MOST and (low == high or fits(high)):
        low, high, stride = high, high + stride, 2 * stride
    high = min(high, MOST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plan_row(name: str, config: jaxkv.CacheConfig, memory: int, exact_bytes: int) -> Row:
    """One codec's numbers: `config` as asked, `memory` and `exact_bytes` in bytes."""

    @functools.cache
    def total(batch: int, tokens: int | None) -> float:
        changed = dataclasses.replace(config, batch=batch, max_tokens=tokens)
        return jaxkv.plan(changed).total if can_number_pages(changed) else math.inf

    def estimate(start: int, steps: int, start_bytes: float, step_bytes: float) -> int:
        """Where `memory` ends if `steps` more of something always take `step_bytes`."""
        if not 0 < step_bytes < math.inf:
            return start
        return start + math.floor((memory - start_bytes) / step_bytes * steps)

    batch, tokens, size = config.batch, config.max_tokens or 1, config.page_size
    kept = max(group.spec.kv_codec.recent_pages + group.sink_pages for group in config.groups)
    far = max(tokens, (kept + config.step_pages + 2) * size)
    page_bytes = total(batch, far + size) - total(batch, far)
    endless = all(spec.window is not None for spec in config.layers)
    if endless and total(batch, None) <= memory:
        max_tokens = None
    else:
        guess = estimate(far, size, total(batch, far), page_bytes)
        max_tokens = largest(lambda n: total(batch, n) <= memory, guess, size)
    sequence_bytes = total(batch + 1, tokens) - total(batch, tokens)
    cache_bytes = jaxkv.plan(config).total
    guess = estimate(batch, 1, cache_bytes, sequence_bytes)
    layers = len(config.layers)
    return Row(
        codec=name,
        bits_per_value=sum(g.bits_per_value * len(g.layers) for g in config.groups) / layers,
        bytes_per_token=page_bytes / size / batch,
        cache_bytes=cache_bytes,
        compression=exact_bytes / cache_bytes,
        max_tokens=max_tokens,
        max_sequences=largest(lambda n: total(n, tokens) <= memory, guess, 1),
        config=config,
    )


def can_number_pages(config: jaxkv.CacheConfig) -> bool:
    """Whether int32 page numbers reach all pages."""
    return all(store.pages <= MOST for store in config.stores)


def plan_rows(
    model: models.DecoderConfig, codecs: dict[str, KVCodec], args: Args, tokens: int
) -> tuple[list[Row], dict[str, str]]:
    """A row for each codec, and why codecs that were not named have none."""

    def config(codec: str | KVCodec) -> jaxkv.CacheConfig:
        return jaxkv.CacheConfig(
            layers=model.layer_specs(args.keep.keep(codec, dtype=args.dtype)),
            batch=args.batch,
            max_tokens=tokens,
            max_new_tokens=args.max_new_tokens,
            page_size=args.page_size,
            platform=args.platform,
        ).checked()

    exact = config("exact")
    exact_bytes = jaxkv.plan(exact).total
    rows, without = [], {}
    for name, codec in codecs.items():
        try:
            planned = config(codec)
        except ValueError as error:  # a codec that can't pack this head_dim
            if args.keep.codec:
                raise
            without[name] = str(error)
            continue
        rows.append(plan_row(name, planned, math.floor(args.memory * GIB), exact_bytes))
    return rows, without


def print_rows(console: Console, rows: list[Row], title: str, args: Args) -> None:
    """The table by codec."""
    each = "" if args.batch == 1 else " each"
    columns = {
        "codec": [row.codec for row in rows],
        "bits per\nvalue": [f"{row.bits_per_value:.2f}" for row in rows],
        "bytes\nper token": [f"{row.bytes_per_token:,.0f}" for row in rows],
        "cache\nbytes": [f"{row.cache_bytes:,}" for row in rows],
        "smaller": [f"{row.compression:.2f}x" for row in rows],
        f"tokens{each}\nthat fit": [
            "no limit" if row.max_tokens is None else f"{row.max_tokens:,}" for row in rows
        ],
        "sequences\nthat fit": [f"{row.max_sequences:,}" for row in rows],
    }
    table = make_table(title, columns)
    table.caption = f"fit: in {args.memory:g} GiB for the cache alone; weights come on top"
    console.print(table)


def print_groups(console: Console, row: Row) -> None:
    """The table of one codec's groups of layers, which adds up to its bytes."""
    groups, planned = row.config.groups, jaxkv.plan(row.config)
    number = lambda n: f"{n:,}" if n else "-"
    pages = lambda group, coded: number(pages_of(row.config, group, coded=coded))
    windows = [group.spec.window for group in groups]
    codecs = [group.spec.kv_codec for group in groups]
    state = planned.total - sum(planned.groups)
    columns = {
        "layers": [layer_range(group.layers) for group in groups] + ["lengths, flags"],
        "window": ["all" if window is None else f"{window:,}" for window in windows] + [""],
        "codec": [codec.name for codec in codecs] + [""],
        "bits per\nvalue": [f"{group.bits_per_value:.2f}" for group in groups] + [""],
        "exact\npages": [pages(group, False) for group in groups] + [""],
        "coded\npages": [pages(group, True) for group in groups] + [""],
        "bytes": [f"{size:,}" for size in (*planned.groups, state)],
    }
    console.print(make_table(f"{row.codec}, {row.cache_bytes:,} bytes:", columns))


def pages_of(config: jaxkv.CacheConfig, group: LayerGroup, *, coded: bool) -> int:
    """Pages of a group's pools that hold codes, or exact values; 0 where it has none."""
    stores = config.stores_of(group)
    return sum(store.pages for store in stores if store.layout.codec.lossy == coded)


def layer_range(layers: tuple[int, ...]) -> str:
    """ "0-3, 5": runs of layer numbers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def row_json(row: Row) -> dict:
    """A row's numbers as plain values."""
    plain = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(row)
        if field.name != "config"
    }
    groups = zip(row.config.groups, jaxkv.plan(row.config).groups, strict=True)
    plain["groups"] = [
        {
            "layers": list(group.layers),
            "window": group.spec.window,
            "codec": group.spec.kv_codec.name,
            "bits_per_value": group.bits_per_value,
            "exact_pages": pages_of(row.config, group, coded=False),
            "coded_pages": pages_of(row.config, group, coded=True),
            "bytes": size,
        }
        for group, size in groups
    ]
    return plain


def main(args: Args) -> int:
    """Prints the plans; returns the exit code."""
    log = Console(stderr=True, highlight=False)
    for name in ("batch", "tokens"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MOST:
            raise ValueError(f"--{name} {value} must be at least 1 and at most {MOST}.")
    if not 0 < args.memory < math.inf:
        raise ValueError(f"--memory {args.memory} must be positive: GiB for the cache.")
    codecs = args.keep.choose(args.keep.codec or codec_names())
    model = read_config(args.model, lambda line: log.print(line, style="dim"))
    tokens = args.tokens or model.max_position
    if tokens is None:
        raise ValueError(f"{args.model}: tells no trained context: give --tokens.")
    rows, without = plan_rows(model, codecs, args, tokens)
    console = Console(file=sys.stdout, highlight=False)
    sequences = "1 sequence" if args.batch == 1 else f"{args.batch} sequences"
    title = (
        f"{args.model}: {model.layers} layers, {model.kv_heads} kv heads x {model.head_dim}; "
        f"{sequences} of {tokens:,} tokens, page size {args.page_size}, {args.dtype}"
    )
    print_rows(console, rows, title, args)
    for name, reason in without.items():
        console.print(f"{name} does not serve this model: {reason}", soft_wrap=True)
    if args.groups or len(rows) == 1:
        for row in rows:
            print_groups(console, row)
    if args.json:
        result = {
            "model": args.model,
            "trained_context": model.max_position,
            "batch": args.batch,
            "tokens": tokens,
            "page_size": args.page_size,
            "dtype": args.dtype,
            "memory_bytes": math.floor(args.memory * GIB),
            "results": [row_json(row) for row in rows],
        }
        print_json(result)
    return 0


if __name__ == "__main__":
    run_command(main, Args)
