"""A cache that outlives a call of generation: its pages, and which tokens they hold."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxkv.cache import KVCache
from jaxkv.config import CacheConfig
from jaxkv.grow import grow
from jaxkv.keep import Keep
from jaxkv.model import Model
from jaxkv.sizes import Sizes, pool_pages, table_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilledCache:
    """What a call of generation leaves behind: `Generation.cache`.

    It keeps the arrays of the cache alive. The next call takes them over (they are donated), so a
    filled cache serves once; that call's `Generation.cache` goes on.
    """

    kv: KVCache
    tokens: tuple[tuple[int, ...], ...]  # tokens that each sequence holds, prompt and answer
    keep: Keep  # which tokens the cache keeps, and how
    sizes: Sizes

    def cached_tokens(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """How many tokens of each prompt need not be fed again.

        All tokens that the sequence holds, if the prompt begins with them and has more; else 0, and
        the sequence starts anew.
        """
        return [
            len(held) if len(held) < len(prompt) and tuple(prompt[: len(held)]) == held else 0
            for held, prompt in zip(self.tokens, prompts, strict=True)
        ]

    def check(self, model: Model, batch: int, keep: Keep | None, sizes: Sizes | None) -> None:
        """Raises ValueError if a call can't go on with this cache."""
        if self.kv.lengths.is_deleted():
            raise ValueError(
                "cache was taken over by an earlier call: give that call's Generation.cache."
            )
        if batch != len(self.tokens):
            raise ValueError(
                f"cache holds {len(self.tokens)} sequences, and prompts has {batch}: prompt i "
                "continues sequence i."
            )
        for name, given, own in (("keep", keep, self.keep), ("sizes", sizes, self.sizes)):
            if given is not None and given != own:
                raise ValueError(f"{name}={given} must be the cache's, {own}, or be left out.")
        if model.layer_specs(self.keep) != self.kv.config.layers:
            raise ValueError("cache belongs to a model with other layers.")

    def config_for(self, totals: Sequence[int]) -> CacheConfig:
        """The cache's configuration, larger if sequences of up to `totals` tokens don't fit."""
        config = self.kv.config
        assert config.max_tokens is not None
        pages = config.pages
        if self.sizes.pages is None and pages is not None:
            pages = max(pages, pool_pages(totals, config.page_size))
        tokens = max(config.max_tokens, table_tokens(totals))
        return dataclasses.replace(config, max_tokens=tokens, pages=pages)

    def make_room(self, config: CacheConfig) -> KVCache:
        """The cache, grown if `config`, made by `config_for`, is larger than its own."""
        return self.kv if config == self.kv.config else grow(self.kv, config)


def restart(cache: KVCache, rows: Sequence[bool]) -> KVCache:
    """Empties the sequences of `rows`; the cache is donated if there are any."""
    return _free(cache, np.asarray(rows)) if any(rows) else cache


_free = jax.jit(KVCache.free, donate_argnums=0)
