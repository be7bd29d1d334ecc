"""Static description of a whole cache: its layers, grouped by what they keep, and their stores."""

import dataclasses
import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from jaxkv.fill import PageFill, TokenFill
from jaxkv.spans import PageSpan
from jaxkv.spec import EXACT, LayerSpec
from jaxkv.store import Fill, StoreSpec
from pallas_kernels.checks import MOST_INT, shown, whole_number
from pallas_kernels.codecs.presets import exact_codec
from pallas_kernels.device import current_platform
from pallas_kernels.layouts.choose import default_layout
from pallas_kernels.layouts.page_layout import PageLayout
from pallas_kernels.layouts.plain import Plain
from pallas_kernels.rule import PageLag, Rule
from pallas_kernels.shapes import cdiv

Layer = int | tuple[int, int | jax.Array] | jax.Array  # number, or (group, index in the group)


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
        """Returns itself; raises ValueError naming a bad value."""
        if not isinstance(self.layers, tuple):
            raise ValueError(f"layers must be a tuple, not {type(self.layers).__name__}.")
        if not self.layers:
            raise ValueError("layers=() must name at least one layer.")
        for spec in self.layers:
            if not isinstance(spec, LayerSpec):
                raise ValueError(f"layers must hold LayerSpecs, not {type(spec).__name__}.")
            spec.checked()
        for name in ("batch", "max_new_tokens", "page_size"):
            whole_number(name, getattr(self, name), least=1)
        current_platform(self.platform)  # raises for an unknown one
        if self.max_tokens is None:
            if any(spec.window is None for spec in self.layers):
                raise ValueError("max_tokens=None needs a window in every layer.")
        else:
            whole_number("max_tokens", self.max_tokens, least=1)
        if self.pages is not None:
            whole_number("pages", self.pages, least=2)  # the null page and one more
        if max(store.pages for store in self.stores) > MOST_INT:  # page ids are int32
            raise ValueError(
                f"batch={self.batch}, max_tokens={self.max_tokens} need more than {MOST_INT} "
                "pages in one pool: give pages, or fewer tokens."
            )
        return self

    @property
    def longest(self) -> int:
        """Most tokens of a sequence: `max_tokens`, or what int32 positions and tables can hold."""
        most = MOST_INT - self.max_new_tokens - self.page_size
        return most if self.max_tokens is None else min(self.max_tokens, most)

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
        plain = Plain(codec=exact_codec(str(spec.dtype)), head_dim=spec.head_dim, page_size=size)
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
            platform="gpu" if current_platform(self.platform) == "gpu" else "cpu",
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
        whole = isinstance(layer, numbers.Integral) and not isinstance(layer, bool)
        if not whole or not 0 <= layer < len(self.layers):
            raise ValueError(f"{layer=} must be a whole number below {len(self.layers)}.")
        number = next(n for n, group in enumerate(self.groups) if layer in group.layers)
        return number, self.groups[number].layers.index(layer)

    def place(self, layer: "Layer") -> tuple[int, int | jax.Array]:
        """Returns `(group, index in the group)` of a layer that may be traced.

        Args:
          layer: a number, or `(group, index)`; the index may be traced, and so may the number if
            all layers are in one group.

        Raises:
          ValueError: there is no such layer, or its group would depend on a traced number.
        """
        if isinstance(layer, tuple):
            if len(layer) != 2:
                raise ValueError(f"{layer=} must be a number or (group, index).")
            group, index = map(_as_int, layer)
            whole_number("group of the layer", group, least=0)
            if group >= len(self.groups):
                raise ValueError(f"{layer=}: the group must be below {len(self.groups)}.")
        elif isinstance(layer := _as_int(layer), jax.Array):
            group, index = 0, layer
            if len(self.groups) > 1:
                raise ValueError(
                    f"layer is traced, and the cache has {len(self.groups)} groups of layers: "
                    "give (group, index) with a static group, see config.locate."
                )
        else:
            return self.locate(layer)  # type: ignore[arg-type]
        layers = len(self.groups[group].layers)
        if isinstance(index, jax.Array):
            if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
                raise ValueError(f"layer is {index.dtype}{list(index.shape)}, not a whole number.")
            checkify.debug_check(
                (index >= 0) & (index < layers), "attend: layer {i} is out of range", i=index
            )
            return group, index.astype(jnp.int32)
        whole_number("index of the layer", index, least=0)
        if index >= layers:
            raise ValueError(f"{layer=}: the index must be below {layers}.")
        return group, index

    def marks(self, group: int, index: int | jax.Array) -> jax.Array:
        """1 at a layer's place among the layers of all groups, in order of groups; `i32[layers]`.

        Of a static index it is a constant, which XLA folds: a step pays for it in no loop.
        """
        before = sum(len(other.layers) for other in self.groups[:group])
        place = np.arange(len(self.layers), dtype=np.int32)
        return jnp.asarray(place == before + index).astype(jnp.int32)


def check_config(config: object) -> None:
    """Raises ValueError for what is no valid configuration."""
    if not isinstance(config, CacheConfig):
        raise ValueError(f"config must be a CacheConfig, not {shown(config)}.")
    config.checked()


def _as_int(value: Any) -> Any:
    """An integer in an array whose value is known as an int; anything else as it is."""
    known = isinstance(value, jax.Array | np.ndarray) and not isinstance(value, Tracer)
    if known and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer):
        return int(value)
    return value
