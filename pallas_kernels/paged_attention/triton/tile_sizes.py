"""Measured tile sizes of the attention kernel, as data by the kind of codes and the shape."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.layouts.plain import Plain
from pallas_kernels.paged_attention.triton.readers import LEAST_COLUMNS, PlanesReader, Reader
from pallas_kernels.pages import Pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Tile sizes: they change speed, never results beyond rounding."""

    block: int = 64  # tokens per step
    warps: int = 4
    stages: int = 3
    transposed: bool = False  # tokens, not query rows, on the long side of the dots
    # Whether one loop masks all blocks; otherwise one loop takes whole blocks without a mask, and a
    # second one takes those at the edges.
    mask_all: bool = True
    # Whether factors are loaded before the words, when few registers are in use; else after dots.
    early_factors: bool = False
    lookups: str = "kv"  # sides whose levels are looked up if there is a table; others compute them
    # Tokens per program from which on its own costs do not matter; fewer if the chip is not full.
    good_tokens: int = 4096
    least_tokens: int = 256  # fewest tokens per program
    at_once: int = 4  # programs that fit on an SM at the same time
    waves: int = 3  # programs launched, as a multiple of those that run at the same time
    programs: int | None = None  # replaces both numbers above, for the whole chip (for tests)
    unsplit: bool = False  # whether no sequence is cut if there are enough to fill the chip


# Tile sizes by the kind of codes, measured on an H100 with pages of 64 tokens: docs/kernels.md.
PLANES = DecodeConfig(
    warps=1, transposed=True, mask_all=False, early_factors=True, least_tokens=64, at_once=8
)
CONFIGS = {
    "exact": DecodeConfig(),
    "byte": DecodeConfig(warps=1, early_factors=True, at_once=8),
    "eight": DecodeConfig(mask_all=False, early_factors=True),
    "planes": PLANES,
    "two": dataclasses.replace(PLANES, early_factors=False),  # values of 2 bits
    "mixed": dataclasses.replace(PLANES, stages=2, early_factors=False),  # one side of 8 bits
}
# Up to 16 rows occupancy was measured: one wave is best (half a wave for 8-bit codes). Elsewhere
# occupancy is a guess, and three waves lose least if it is wrong: a grid smaller than the chip's
# room fills some SMs and leaves others idle. Occupancy depends on registers, the compiler's choice;
# with the stages of "exact" and "planes" shared memory bounds it instead.
MEASURED = {
    "exact": dict(at_once=3, waves=1),
    "eight": dict(warps=1, transposed=True, waves=1),
    "planes": dict(stages=4, waves=1),
    "two": dict(waves=1),
    "mixed": dict(waves=1),
}
# Blocks of a prompt's chunk: 128 rows in 8 warps fill an SM's registers.
CHUNK = DecodeConfig(warps=8, mask_all=False, at_once=1, waves=1, unsplit=True)
MOST_BYTES = 2**15  # most bytes of an exact block's keys and values


def choose_config(k: Reader, v: Reader, rows: int, window: int | None = None) -> DecodeConfig:
    """Tile sizes for a pair of readers and `rows` query rows per kv head.

    Starts from the sizes for the kind of codes, adapts them to rows, head_dim and window, and takes
    the `MEASURED` ones where the case was measured.
    """
    kind = _kind(k, v)
    config = CONFIGS[kind]
    if rows > 16 and config.transposed:
        config = dataclasses.replace(config, warps=4, at_once=4)
    block = _block(kind, k, v, rows, window)
    least_tokens = max(block, config.least_tokens)
    config = dataclasses.replace(config, block=block, least_tokens=least_tokens)
    full = block * _exact_bytes(k, v) == MOST_BYTES
    measured = {
        "exact": full or k.head_dim == 128,
        "eight": True,
    }.get(kind, k.head_dim <= 192)
    if rows <= 16 and measured:
        config = dataclasses.replace(config, **MEASURED.get(kind, {}))
    return config


def _block(kind: str, k: Reader, v: Reader, rows: int, window: int | None) -> int:
    """Tokens per block: fewer for wide heads, more for narrow exact ones.

    For codes never more than the 64 tokens of a usual page: where a block is larger than a page,
    the page of each token is looked up by itself.
    """
    if kind == "exact":
        few = rows > 16 or (window is not None and window < 1024)
        block = min(MOST_BYTES // _exact_bytes(k, v), 64 if few else 128)
        return max(1 << block.bit_length() - 1, LEAST_COLUMNS)
    transposed = CONFIGS[kind].transposed
    return 32 if k.head_dim > 128 and not (transposed and rows > 16) else 64


def _exact_bytes(*sides: Reader) -> int:
    """Bytes of one token's numbers, for readers of exact pages."""
    return sum(side.head_dim * jnp.dtype(side.dtype).itemsize for side in sides)


def _kind(k: Reader, v: Reader) -> str:
    if not isinstance(k, PlanesReader) and not isinstance(v, PlanesReader):
        return "exact" if k.arrays == ("k",) else "byte"
    if not isinstance(k, PlanesReader) or not isinstance(v, PlanesReader):
        return "mixed"
    if k.width == v.width == 8:
        return "eight"
    if 8 in (k.width, v.width):
        return "mixed"
    return "two" if v.levels.bits == 2 else "planes"


def chunk_config(pages: Pages) -> DecodeConfig:
    """Tile sizes for blocks of a prompt's chunk (`chunks`)."""
    large = isinstance(pages.layout, Plain) and pages.dims["head_dim"] > 128
    return dataclasses.replace(CHUNK, block=32) if large else CHUNK
