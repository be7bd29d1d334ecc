"""Sizes of the pieces that generation works in, chosen so that few programs serve many prompts."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from jaxkv.config import CacheConfig
from jaxkv.keep import Keep
from jaxkv.model import Model
from pallas_kernels.checks import whole_number
from pallas_kernels.shapes import cdiv

# Compiled programs depend on the shapes of tables and pools. Up to this many tokens they have the
# same: per sequence in tables, and in all sequences together in pools.
LEAST_TOKENS = 4096
POOL_STEPS = 16  # sizes of larger pools per power of two: at most a sixteenth of a pool is unused
SMALL_CHUNKS = 4  # short chunks per long one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the pieces that generation works in: they trade memory, speed and latency.

    Attributes:
      page_size: tokens per page. A lossy codec keeps a number of whole pages exact, so the page
        size also decides how many tokens stay exact.
      pages: cap on the pages of each pool of the cache, the null page included; None reserves for
        the worst case. With fewer, sequences share the pages there are and wait for free ones; if
        none can go on, they end as "no_pages".
      chunk: most prompt tokens per sequence and step; None for `default_chunk`. Long chunks fill
        the chip better and take more pages of windowed layers. Ends of prompts are read in chunks
        of a quarter of it.
      block: most decode steps per call of the host, which then reports tokens (`stream`).
    """

    page_size: int = 64
    pages: int | None = None
    chunk: int | None = None
    block: int = 16

    def checked(self) -> "Sizes":
        """Returns itself; raises ValueError for a size that is no whole number above 0."""
        for name in ("page_size", "chunk", "block"):
            value = getattr(self, name)
            if value is not None:
                whole_number(name, value, least=1)
        if self.pages is not None:
            whole_number("pages", self.pages, least=2)  # the null page and one more
        return self


def cache_config(model: Model, keep: Keep, sizes: Sizes, totals: Sequence[int]) -> CacheConfig:
    """Configures a cache for sequences of up to `totals` tokens, prompt and answer together."""
    return CacheConfig(
        layers=model.layer_specs(keep),
        batch=len(totals),
        max_tokens=table_tokens(totals),
        max_new_tokens=sizes.chunk or default_chunk(len(totals), sizes.pages, _platform()),
        page_size=sizes.page_size,
        pages=sizes.pages or pool_pages(totals, sizes.page_size),
    ).checked()


def table_tokens(totals: Sequence[int]) -> int:
    """Tokens per sequence that tables have room for: a power of two."""
    return max(LEAST_TOKENS, 1 << (max(totals) - 1).bit_length())


def pool_pages(totals: Sequence[int], page_size: int) -> int:
    """Pages, the null page included, that hold every sequence at its longest."""
    pages = max(sum(cdiv(total, page_size) for total in totals), cdiv(LEAST_TOKENS, page_size))
    step = max(1, (1 << (pages.bit_length() - 1)) // POOL_STEPS)
    return 1 + cdiv(pages, step) * step


def default_chunk(prompts: int, pages: int | None, platform: str) -> int:
    """Most prompt tokens per sequence and step, at least 256.

    On a GPU or TPU it is more for fewer than 4 prompts: about 1024 tokens of all prompts together.
    With a cap on pages (`pages`) it stays 256, as longer chunks need more pages of windowed layers.
    """
    if platform == "cpu" or pages is not None:
        return 256
    return max(256, 1024 // max(1, prompts) // 64 * 64)


def chunks(tokens: int, chunk: int) -> Iterator[int]:
    """Sizes of the chunks that read `tokens` of a prompt: `chunk`, and short ones for its end."""
    small = cdiv(chunk, SMALL_CHUNKS)
    while tokens > 0:
        size = small if tokens <= chunk // 2 else chunk
        yield size
        tokens -= size


def _platform() -> str:
    return jax.default_backend()
