"""What a cache is made of: static, hashable descriptions of layers and of the whole cache."""

import dataclasses
from typing import Literal

EXACT = "exact"


def cdiv(a: int, b: int) -> int:
    """Smallest integer that is at least `a / b`."""
    return -(-a // b)


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
      codec: how pages are stored; "exact" keeps `dtype`.
      dtype: float type of exact pages.
    """

    kv_heads: int
    head_dim: int
    window: int | None = None
    sink_tokens: int = 0
    sink_positions: Literal["original", "cache"] = "original"
    codec: str = EXACT
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
        if self.codec != EXACT:
            raise NotImplementedError(f"codec={self.codec!r}: only {EXACT!r} is available.")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={self.dtype!r} must be bfloat16, float16 or float32.")
        return self

    @property
    def stored_sink_tokens(self) -> int:
        """Sink tokens that need a table of their own: without a window every token stays."""
        return 0 if self.window is None else self.sink_tokens

    @property
    def q_sink_limit(self) -> int | None:
        """Largest position of the query that attends sinks; None: sinks see the query as it is."""
        if self.sink_positions == "original" or self.window is None:
            return None
        return self.sink_tokens + self.window - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that share one page table and one allocator because their specs are equal."""

    spec: LayerSpec
    layers: tuple[int, ...]
    table_width: int  # slots of the ring page table
    sink_pages: int  # entries of the sink table
    pages: int  # of the pool, the null page included


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Static description of a `KVCache`.

    Attributes:
      layers: one spec a layer, in model order.
      batch: sequences held side by side.
      max_tokens: longest sequence; None (no end) where every layer has a window.
      max_new_tokens: most tokens one step may add to a sequence (prefill chunk, drafts).
      page_size: tokens a page.
      pages: cap on each group's pool, the null page included; None reserves for the worst case.
        With fewer, sequences share what there is and may starve (`KVCache.starved`).
    """

    layers: tuple[LayerSpec, ...]
    batch: int
    max_tokens: int | None = None
    max_new_tokens: int = 1
    page_size: int = 64
    pages: int | None = None

    def checked(self) -> "CacheConfig":
        """Returns itself; raises ValueError naming the value that can't be."""
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
        return self

    @property
    def step_pages(self) -> int:
        """Most pages that one step can add to, or push out of, one sequence."""
        return cdiv(self.max_new_tokens, self.page_size)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers grouped by spec, in order of first appearance."""
        members: dict[LayerSpec, list[int]] = {}
        for layer, spec in enumerate(self.layers):
            members.setdefault(spec, []).append(layer)
        return tuple(self._group(spec, tuple(layers)) for spec, layers in members.items())

    def _group(self, spec: LayerSpec, layers: tuple[int, ...]) -> LayerGroup:
        sink_pages = cdiv(spec.stored_sink_tokens, self.page_size)
        widths = []
        if spec.window is not None:
            # The newest step's tokens and the window of its oldest query, at any alignment.
            widths.append(cdiv(spec.window + self.max_new_tokens - 2, self.page_size) + 1)
        if self.max_tokens is not None:
            longest = cdiv(self.max_tokens, self.page_size)
            sink_pages = min(sink_pages, longest)
            widths.append(longest - sink_pages)
        width = max(min(widths), 1)
        pages = 1 + self.batch * (width + sink_pages)
        if self.pages is not None:
            pages = min(pages, self.pages)
        return LayerGroup(
            spec=spec, layers=layers, table_width=width, sink_pages=sink_pages, pages=pages
        )

    def locate(self, layer: int) -> tuple[int, int]:
        """Returns `(group, index in the group)` of a layer."""
        for number, group in enumerate(self.groups):
            if layer in group.layers:
                return number, group.layers.index(layer)
        raise ValueError(f"{layer=} must be below {len(self.layers)}.")
