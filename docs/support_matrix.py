"""Writes docs/support.md: which backend serves what, as `jaxkv.explain` tells it for each platform.

`--check` only compares the page with what it should be, and exits with 1 where they differ.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

import jaxkv
from jaxkv.codecs import codec_names

PAGE = Path(__file__).with_name("support.md")
PLATFORMS = {"cpu": "CPU", "gpu": "GPU (NVIDIA)", "tpu": "TPU"}
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PAGE_SIZES = (16, 32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")
LAYER = jaxkv.LayerSpec(kv_heads=8, head_dim=128, dtype="bfloat16")
LAYERS = {
    "all tokens": {},
    "window": dict(window=1024),
    "window and sink tokens": dict(window=1024, sink_tokens=4),
    "the same, cache positions": dict(window=1024, sink_tokens=4, sink_positions="cache"),
}
HEAD = """# What runs where

Made by `python docs/support_matrix.py` from what `jaxkv.explain` says; `make docs` checks that it
is current. `gpu` is a Pallas kernel, `xla` plain JAX, which runs on every platform. Where one word
stands, that backend attends, writes and quantizes alike. A cell with an error is refused with that
error when the cache is built. `explain` tells the same of a configuration of yours.

A GPU kernel serves up to 128 query rows (query tokens times the query heads of a kv head) at once,
and chunks of prompts in blocks of that size.
"""


def served(platform: str, page_size: int = 64, **spec) -> str:
    """A cell: the backends of a layer on a platform, or the error that refuses it."""
    layer = dataclasses.replace(LAYER, **spec)
    config = jaxkv.CacheConfig(
        layers=(layer,), batch=2, max_tokens=4096, page_size=page_size, platform=platform
    )
    try:
        [report] = jaxkv.explain(config)
    except (ValueError, NotImplementedError) as error:
        return f"no: {str(error).replace('|', '/')}"
    parts = {
        "decode": report.attention,
        "prompts": report.prefill,
        "writes": report.write,
        "quantizes": report.quantize,
    }
    told = {name: str(backend) for name, backend in parts.items() if backend is not None}
    main = told["decode"]
    others = [f"{name} by `{by}`" for name, by in told.items() if by != main]
    return f"`{main}`" + "".join(f", {other}" for other in others)


def table(first: str, columns: Iterable[str], rows: dict[str, list[str]]) -> str:
    """A table of Markdown."""
    head = ["", first, *columns, ""]
    lines = [" | ".join(head).strip(), "|" + "---|" * (len(head) - 2)]
    lines += [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    platforms = PLATFORMS.values()
    everywhere = lambda **spec: [served(platform, **spec) for platform in PLATFORMS]
    coded = [name for name in codec_names() if name != "exact"]
    floats = {dtype: everywhere(dtype=dtype) for dtype in DTYPES}
    codecs = {f"`{name}`": everywhere(codec=name) for name in coded}
    layers = {
        f"{name}, {codec}": everywhere(codec=codec, **spec)
        for name, spec in LAYERS.items()
        for codec in ("exact", "tq4")
    }
    some = ("exact", "fp8_e4m3", "int8", "4bit_nc", "tq4", "tq3")
    names = [f"`{name}`" for name in some]
    heads = {
        str(size): [served("gpu", codec=name, head_dim=size) for name in some] for size in HEAD_DIMS
    }
    sizes = {
        str(size): [served("gpu", codec=name, page_size=size) for name in some]
        for size in PAGE_SIZES
    }
    parts = [
        HEAD,
        "## Exact pages\n\nHeads of 128, pages of 64 tokens.\n",
        table("float type", platforms, floats),
        "## Codecs\n\nHeads of 128, pages of 64 tokens.\n",
        table("codec", platforms, codecs),
        "## Layers\n\nMixed in one cache as a model has them.\n",
        table("the layer sees, codec", platforms, layers),
        "## Head sizes on a GPU\n\nPages of 64 tokens; CPU and TPU serve all by `xla`.\n",
        table("head_dim", names, heads),
        "## Page sizes on a GPU\n\nHeads of 128.\n",
        table("tokens per page", names, sizes),
    ]
    return "\n".join(parts)


def main() -> int:
    """Writes or checks the page; returns the exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--check", action="store_true", help="compare only")
    made = page()
    if not options.parse_args().check:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
        print(f"error: {PAGE} is not current: python docs/support_matrix.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
