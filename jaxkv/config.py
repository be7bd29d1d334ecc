"""Static description of a whole cache: its layers, grouped by what they keep, and their stores."""

import dataclasses
import functools

import jax.numpy as jnp

from jaxkv.fill import PageFill, TokenFill
from jaxkv.spans import PageSpan
from jaxkv.spec import EXACT, LayerSpec
from jaxkv.store import Fill, StoreSpec
from pallas_kernels.codecs.presets import exact_codec
from pallas_kernels.device import current_platform
from pallas_kernels.layouts.choose import default_layout
from pallas_kernels.layouts.page_layout import PageLayout
from pallas_kernels.layouts.plain import Plain
from pallas_kernels.rule import PageLag, Rule
from pallas_kernels.shapes import cdiv

MOST_PAGES = 2**31 - 1  # page ids are int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that share page tables and allocators because they keep the same tokens.

    With an exact codec a group has one store. With a lossy one it has a store of codes, preceded by
    an exact store for the newest pages and the sink pages, if the codec keeps any exact.
    """

    spec: LayerSpec
    layers: tuple[int, ...]  # numbers of the layers
    sink_pages: int  # pages per sequence that are pinned for its first tokens
    stores: tuple[int, ...]  # numbers of the group's stores in the cache, the main one last
    page_size: int  # tokens per page

    @property
    def coded(self) -> bool:
        """Whether the last store holds codes."""
        return self.spec.kv_codec.lossy

    @property
    def bits_per_value(self) -> float:
        """Stored bits per cached number in the main store, which holds codes or exact values."""
        if not self.coded:
            return 8.0 * jnp.dtype(self.spec.dtype).itemsize
        return self.spec.kv_codec.bits_per_value(self.spec.head_dim, self.page_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Static description of a `KVCache`.

    Attributes:
      layers: one spec per layer, in model order.
      batch: number of sequences held side by side.
      max_tokens: most tokens of a sequence; None for no limit, if every layer has a window.
      max_new_tokens: most tokens one step may add to a sequence (prefill chunk, drafts).
      page_size: tokens per page.
      pages: cap on the pages of each pool, the null page included; None reserves for the worst
        case. With fewer, sequences share the pages there are and may starve (`KVCache.starved`).
      platform: the platform whose kernels read the pages of codes, "cpu", "gpu" or "tpu"; None for
        JAX's default.
    """

    layers: tuple[LayerSpec, ...]
    batch: int
    max_tokens: int | None = None
    max_new_tokens: int = 1
    page_size: int = 64
    pages: int | None = None
    platform: str | None = None

    def checked(self) -> "CacheConfig":
        """Returns itself with the platform filled in; raises ValueError naming a bad value."""
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
        config = dataclasses.replace(self, platform=current_platform(self.platform))
        if max(store.pages for store in config.stores) > MOST_PAGES:
            raise ValueError(
                f"batch={self.batch}, max_tokens={self.max_tokens} need more than {MOST_PAGES} "
                "pages in one pool: give pages, or fewer tokens."
            )
        return config

    @property
    def step_pages(self) -> int:
        """Most pages that one step can add to, or push out of, one sequence."""
        return cdiv(self.max_new_tokens, self.page_size)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers grouped by what they keep, in order of first appearance."""
        return self._parts[0]

    @property
    def stores(self) -> tuple[StoreSpec, ...]:
        """The stores of all groups, in order."""
        return self._parts[1]

    def stores_of(self, group: LayerGroup) -> tuple[StoreSpec, ...]:
        """The stores of one group."""
        return tuple(self.stores[number] for number in group.stores)

    @functools.cached_property
    def _parts(self) -> tuple[tuple[LayerGroup, ...], tuple[StoreSpec, ...]]:
        members: dict[LayerSpec, list[int]] = {}
        for layer, spec in enumerate(self.layers):
            members.setdefault(self.effective(spec), []).append(layer)
        groups, stores = [], []
        for spec, layers in members.items():
            sink_pages = self._sink_pages(spec)
            own = self._stores(spec, sink_pages, layers=len(layers), before=len(stores))
            group = LayerGroup(
                spec=spec,
                layers=tuple(layers),
                sink_pages=sink_pages,
                stores=tuple(range(len(stores), len(stores) + len(own))),
                page_size=self.page_size,
            )
            groups.append(group)
            stores += own
        return tuple(groups), tuple(stores)

    def effective(self, spec: LayerSpec) -> LayerSpec:
        """The spec that a layer gets: exact if its window lies within the codec's recent pages."""
        codec = spec.kv_codec
        recent = codec.recent_pages * self.page_size
        if not codec.lossy or (spec.window is not None and spec.window <= recent):
            return dataclasses.replace(spec, codec=EXACT)
        return spec

    def _sink_pages(self, spec: LayerSpec) -> int:
        """Pages per sequence that are pinned for its first tokens."""
        codec = spec.kv_codec
        if codec.lossy:
            sink_tokens = max(spec.sink_tokens, codec.sink_tokens)
        else:  # without a window every token stays, so none has to be pinned
            sink_tokens = 0 if spec.window is None else spec.sink_tokens
        sink_pages = cdiv(sink_tokens, self.page_size)
        if self.max_tokens is None:
            return sink_pages
        return min(sink_pages, cdiv(self.max_tokens, self.page_size))

    def _stores(
        self, spec: LayerSpec, sink_pages: int, *, layers: int, before: int
    ) -> list[StoreSpec]:
        """The stores of a group; `before` is the number of stores of earlier groups."""
        codec, size = spec.kv_codec, self.page_size
        make = functools.partial(self._store, layers=layers, kv_heads=spec.kv_heads)
        span = functools.partial(PageSpan, page_size=size, first=sink_pages)
        plain = Plain(codec=exact_codec(spec.dtype), head_dim=spec.head_dim, page_size=size)
        rule = Rule(window=spec.window, sink_tokens=spec.sink_tokens if sink_pages else 0)
        if not codec.lossy:
            return [make(span(rule=rule, sink_pages=sink_pages), TokenFill(), plain)]
        recent, stores = codec.recent_pages, []
        if recent or sink_pages:
            newest = dataclasses.replace(rule, lag=PageLag(size, 0, recent))
            stores.append(make(span(rule=newest, sink_pages=sink_pages), TokenFill(), plain))
        older = Rule(window=spec.window, lag=PageLag(size, recent) if recent else None)
        layout = default_layout(
            codec,
            # There is no TPU kernel: plain JAX runs on TPUs and reads the CPU's layout there, too.
            platform="gpu" if self.platform == "gpu" else "cpu",
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            page_size=size,
        )
        fill = PageFill(source=before) if recent else TokenFill()
        codes = span(rule=older, sink_pages=0, complete=bool(recent))
        return [*stores, make(codes, fill, layout)]

    def _store(
        self, span: PageSpan, fill: Fill, layout: PageLayout, *, layers: int, kv_heads: int
    ) -> StoreSpec:
        """Describes a store, with the sizes of its ring table and its pool."""
        width = span.width(self.max_new_tokens, self.max_tokens)
        ring = 0 if span.sinks_only else width  # with sinks alone, the ring's one slot stays null
        pages = 1 + self.batch * (ring + span.sink_pages)
        return StoreSpec(
            span=span,
            fill=fill,
            layout=layout,
            layers=layers,
            kv_heads=kv_heads,
            width=width,
            pages=pages if self.pages is None else min(pages, self.pages),
        )

    def locate(self, layer: int) -> tuple[int, int]:
        """Returns `(group, index in the group)` of a layer; raises ValueError if there is none."""
        for number, group in enumerate(self.groups):
            if layer in group.layers:
                return number, group.layers.index(layer)
        raise ValueError(f"{layer=} must be below {len(self.layers)}.")
