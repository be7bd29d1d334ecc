"""What a cache is made of: static, hashable descriptions of layers and of the whole cache."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxkv.codecs import KVCodec, PageLayout, default_layout, get_codec
from pallas_kernels.rule import PageLag, Rule
from pallas_kernels.shapes import cdiv

EXACT = "exact"
MOST_PAGES = 2**31 - 1  # page ids are int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """How one attention layer keeps its keys and values.

    Attributes:
      kv_heads: key/value heads.
      head_dim: channels of one head.
      window: tokens a query sees, itself included; None for all (sliding-window attention).
      sink_tokens: first tokens kept for ever beside the window (StreamingLLM).
      sink_positions: "original", or "cache": sink keys are attended by a query rotated to the
        place it has inside the cache, so that no distance exceeds `sink_tokens + window`.
      codec: how pages are stored, a name (`jaxkv.codecs.codec_names()`) or a `KVCodec`; "exact"
        keeps `dtype`. A lossy one says how many of the newest pages and first tokens stay exact;
        a window that lies within those pages makes the layer exact.
      dtype: float type of exact pages.
    """

    kv_heads: int
    head_dim: int
    window: int | None = None
    sink_tokens: int = 0
    sink_positions: Literal["original", "cache"] = "original"
    codec: str | KVCodec = EXACT
    dtype: str = "bfloat16"

    def checked(self) -> "LayerSpec":
        """Returns itself; raises ValueError for a value that makes no sense."""
        for name in ("kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None for all tokens.")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens={self.sink_tokens} must not be negative.")
        if self.sink_positions not in ("original", "cache"):
            raise ValueError(f"sink_positions={self.sink_positions!r}: 'original' or 'cache'.")
        if self.sink_positions == "cache" and self.window is None:
            raise ValueError("sink_positions='cache' needs a window, and window=None.")
        _ = self.kv_codec  # an unknown name says so
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={self.dtype!r} must be bfloat16, float16 or float32.")
        return self

    @property
    def kv_codec(self) -> KVCodec:
        """The codec itself; raises ValueError for an unknown name."""
        return get_codec(self.codec) if isinstance(self.codec, str) else self.codec

    @property
    def q_sink_limit(self) -> int | None:
        """Largest position of the query that attends sinks; None: sinks see the query as it is."""
        if self.sink_positions == "original" or self.window is None:
            return None
        return self.sink_tokens + self.window - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """One pool of pages in a group, the tables that name them, and which pages live in it.

    Logical pages stand in a ring of `width` slots, the group's first `sink_pages` of them in a
    table of their own. Which are alive follows from a sequence's length alone.
    """

    width: int
    sink_pages: int  # in this store
    pages: int  # of the pool, the null page included
    first: int  # first logical page of the ring: the group's sink pages come before it
    page_size: int
    rule: Rule  # which keys of this store a query reads

    @property
    def lag(self) -> PageLag:
        """Pages behind the query's own that this store serves."""
        return self.rule.lag or PageLag(self.page_size)

    @property
    def releases(self) -> bool:
        """Whether pages fall behind as a sequence grows."""
        return self.rule.most_pages(1, self.page_size) is not None

    def first_page(self, lengths: jax.Array) -> jax.Array:
        """Oldest page of the ring that a query at position `lengths` or later reads here."""
        first = jnp.full_like(lengths, self.first)
        seen = self.rule.first_page(lengths, self.page_size)
        return first if seen is None else jnp.maximum(first, seen)

    def stop_page(self, lengths: jax.Array) -> jax.Array:
        """One past the newest page that stands here once `lengths` tokens are committed."""
        if self.lag.least:  # complete pages, as far back as the lag says
            return jnp.maximum(self.lag.stop_page(lengths), self.first)
        begun = cdiv(lengths, self.page_size)
        if self.lag.most == 0:  # sink pages alone
            return jnp.minimum(begun, self.sink_pages)
        return begun if self.sink_pages else jnp.maximum(begun, self.first)

    def is_written(self, logical: jax.Array) -> jax.Array:
        """Whether new tokens of page `logical` are written here, `bool[...]`."""
        sinks = logical < self.sink_pages
        if self.lag.least or self.lag.most == 0:
            return sinks
        return sinks | (logical >= self.first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that share page tables and allocators because they keep the same things.

    An exact codec has one store. A lossy one has a `body` of codes, and an `exact` store for the
    newest pages and the sink pages unless it keeps none exact.
    """

    spec: LayerSpec
    layers: tuple[int, ...]
    sink_pages: int
    exact: StoreSpec | None
    body: StoreSpec | None
    layout: PageLayout | None  # of the body's pages

    @property
    def stores(self) -> tuple[StoreSpec, ...]:
        """Those there are."""
        return tuple(store for store in (self.exact, self.body) if store is not None)

    @property
    def bits_per_value(self) -> float:
        """Stored bits per cached number: of the body, or of an exact layer's dtype."""
        if self.body is None:
            return 8.0 * jnp.dtype(self.spec.dtype).itemsize
        return self.spec.kv_codec.bits_per_value(self.spec.head_dim, self.body.page_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Static description of a `KVCache`.

    Attributes:
      layers: one spec a layer, in model order.
      batch: sequences held side by side.
      max_tokens: longest sequence; None (no end) where every layer has a window.
      max_new_tokens: most tokens one step may add to a sequence (prefill chunk, drafts).
      page_size: tokens a page.
      pages: cap on each pool, the null page included; None reserves for the worst case. With
        fewer, sequences share what there is and may starve (`KVCache.starved`).
      platform: whose kernels coded pages are laid out for, "cpu", "gpu" or "tpu"; None for JAX's
        default.
    """

    layers: tuple[LayerSpec, ...]
    batch: int
    max_tokens: int | None = None
    max_new_tokens: int = 1
    page_size: int = 64
    pages: int | None = None
    platform: str | None = None

    def checked(self) -> "CacheConfig":
        """Returns itself with the platform named; raises ValueError naming what can't be."""
        if not isinstance(self.layers, tuple):
            raise ValueError(f"layers must be a tuple, not {type(self.layers).__name__}.")
        if not self.layers:
            raise ValueError("layers=() must name at least one layer.")
        for spec in self.layers:
            spec.checked()
        for name in ("batch", "max_new_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.max_tokens is None:
            if any(spec.window is None for spec in self.layers):
                raise ValueError("max_tokens=None needs a window in every layer.")
        elif self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1.")
        if self.pages is not None and self.pages < 2:
            raise ValueError(f"pages={self.pages} must be at least 2: the null page and one more.")
        platform = self.platform or jax.default_backend()
        config = dataclasses.replace(self, platform=platform)
        stores = [store for group in config.groups for store in group.stores]
        if max(store.pages for store in stores) > MOST_PAGES:
            raise ValueError(
                f"batch={self.batch}, max_tokens={self.max_tokens} need more than {MOST_PAGES} "
                "pages in one pool: give pages, or fewer tokens."
            )
        return config

    @property
    def step_pages(self) -> int:
        """Most pages that one step can add to, or push out of, one sequence."""
        return cdiv(self.max_new_tokens, self.page_size)

    @functools.cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers grouped by what they keep, in order of first appearance."""
        members: dict[LayerSpec, list[int]] = {}
        for layer, spec in enumerate(self.layers):
            members.setdefault(self.effective(spec), []).append(layer)
        return tuple(self._group(spec, tuple(layers)) for spec, layers in members.items())

    def effective(self, spec: LayerSpec) -> LayerSpec:
        """The spec that a layer gets: exact where its window lies within the recent pages."""
        codec = spec.kv_codec
        recent = codec.recent_pages * self.page_size
        if not codec.lossy or (spec.window is not None and spec.window <= recent):
            return dataclasses.replace(spec, codec=EXACT)
        return spec

    def _group(self, spec: LayerSpec, layers: tuple[int, ...]) -> LayerGroup:
        codec, size = spec.kv_codec, self.page_size
        if codec.lossy:
            sink_tokens = max(spec.sink_tokens, codec.sink_tokens)
        else:  # without a window every token stays anyway
            sink_tokens = 0 if spec.window is None else spec.sink_tokens
        sink_pages = cdiv(sink_tokens, size)
        if self.max_tokens is not None:
            sink_pages = min(sink_pages, cdiv(self.max_tokens, size))
        rule = Rule(window=spec.window, sink_tokens=spec.sink_tokens if sink_pages else 0)
        store = functools.partial(self._store, sink_pages)
        layout = body = None
        if not codec.lossy:
            exact = store(rule, sinks=True)
        else:
            recent = codec.recent_pages
            newest = dataclasses.replace(rule, lag=PageLag(size, 0, recent))
            exact = store(newest, sinks=True) if recent or sink_pages else None
            older = PageLag(size, recent) if recent else None
            body = store(Rule(window=spec.window, lag=older), sinks=False)
            layout = default_layout(
                codec,
                platform="gpu" if self.platform == "gpu" else "cpu",
                kv_heads=spec.kv_heads,
                head_dim=spec.head_dim,
                page_size=size,
            )
        return LayerGroup(
            spec=spec, layers=layers, sink_pages=sink_pages, exact=exact, body=body, layout=layout
        )

    def _store(self, sink_pages: int, rule: Rule, *, sinks: bool) -> StoreSpec:
        """Sizes a store so that prepared tokens never overwrite a live page, at any alignment."""
        size, step = self.page_size, self.max_new_tokens
        lag = rule.lag or PageLag(size)
        # What the queries of a step read. Pages that are filled by quantizing are complete when the
        # step commits: then the next query reads them, too.
        queries = step + 1 if lag.least else step
        most_pages = rule.most_pages(queries, size)
        widths = [] if most_pages is None else [most_pages]
        if self.max_tokens is not None:
            if lag.least:
                widths.append(self.max_tokens // size - lag.least + 1 - sink_pages)
            else:
                widths.append(cdiv(self.max_tokens, size) - sink_pages)
        width = max(min(widths), 1)
        ring = 0 if lag.most == 0 else width  # sinks alone: the ring's one slot stays null
        pages = 1 + self.batch * (ring + (sink_pages if sinks else 0))
        return StoreSpec(
            width=width,
            sink_pages=sink_pages if sinks else 0,
            pages=pages if self.pages is None else min(pages, self.pages),
            first=sink_pages,
            page_size=size,
            rule=rule,
        )

    def locate(self, layer: int) -> tuple[int, int]:
        """Returns `(group, index in the group)` of a layer."""
        for number, group in enumerate(self.groups):
            if layer in group.layers:
                return number, group.layers.index(layer)
        raise ValueError(f"{layer=} must be below {len(self.layers)}.")
