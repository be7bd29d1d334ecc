"""Tells which backends serve each group of layers, and how the group stores its tokens."""

import dataclasses
import functools

from jaxkv.abstract_cache import abstract_cache
from jaxkv.config import CacheConfig, LayerGroup, check_config
from jaxkv.fill import TokenFill
from jaxkv.plan import plan
from jaxkv.store import Store
from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import choose
from pallas_kernels.quantize_pages import choose as choose_quantizer
from pallas_kernels.write_pages import choose as choose_writer

PREFILL_TOKENS = 64  # query tokens of the call that represents a chunk of a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupReport:
    """One layer group: what it keeps, and which backends read and write it."""

    layers: tuple[int, ...]  # numbers of the layers
    window: int | None  # tokens
    sink_tokens: int
    sink_positions: str  # "original" or "cache"
    codec: str  # name
    dtype: str  # float type of exact pages
    bits_per_value: float  # averaged over keys and values, factors and means included
    recent_pages: int  # newest pages that are read exactly; 0 with an exact codec
    exact_sink_pages: int  # first pages that are read exactly; 0 with an exact codec
    note: str  # why the codec is not the one that was asked for; "" if it is
    pages: int  # pages of all pools of the group
    bytes: int  # bytes of all arrays of the group
    attention: Backend  # attends in decode steps
    prefill: Backend  # attends chunks of prompts
    write: Backend  # writes new tokens
    quantize: Backend | None  # turns pages into codes; None without codes

    def __str__(self) -> str:
        numbers = self.layers
        run = numbers == tuple(range(numbers[0], numbers[-1] + 1))
        name = f"{numbers[0]}-{numbers[-1]}" if run else ",".join(map(str, numbers))
        sees = "all tokens" if self.window is None else f"window {self.window}"
        if self.sink_tokens:
            sees += f" + {self.sink_tokens} sink tokens ({self.sink_positions} positions)"
        kept = f"{self.codec} {self.dtype}"
        if self.quantize is not None:
            kept = f"{self.codec}, {self.bits_per_value:.3g} bits a value"
            if self.recent_pages or self.exact_sink_pages:
                kept += f", newest {self.recent_pages} and first {self.exact_sink_pages} pages "
                kept += f"{self.dtype}"
        note = f" ({self.note})" if self.note else ""
        attention = str(self.attention)
        if self.prefill != self.attention:
            attention += f" (prefill {self.prefill})"
        backends = f"attention {attention}, write {self.write}"
        if self.quantize is not None:
            backends += f", quantize {self.quantize}"
        return (
            f"layers {name}: {sees}; {kept}{note}; {self.pages} pages, "
            f"{self.bytes / 2**20:.1f} MiB; {backends}"
        )


def explain(
    config: CacheConfig, *, backend: Backend | None = None, platform: str | None = None
) -> list[GroupReport]:
    """Tells which backends `KVCache.attend` will use for each layer group, without running it.

    Args:
      config: the cache's configuration.
      backend: the backend that will be passed to `attend`.
      platform: "cpu", "gpu" or "tpu"; None for the configuration's, or JAX's default.

    Returns:
      One report per group of layers; printed, each is one line.

    Raises:
      ValueError: the configuration is not valid.
      NotImplementedError: the named backend does not serve it.
    """
    check_config(config)
    config = dataclasses.replace(config, platform=platform or config.platform)
    platform = config.platform
    abstract = abstract_cache(config)
    serving = functools.partial(_serving, backend=backend, platform=platform)
    reports = []
    for group, size in zip(config.groups, plan(config).groups, strict=True):
        stores = [abstract.stores[number] for number in group.stores]
        codec = group.spec.kv_codec
        reports.append(
            GroupReport(
                layers=group.layers,
                window=group.spec.window,
                sink_tokens=group.spec.sink_tokens,
                sink_positions=group.spec.sink_positions,
                codec=codec.name,
                dtype=str(group.spec.dtype),
                bits_per_value=group.bits_per_value,
                recent_pages=codec.recent_pages if group.coded else 0,
                exact_sink_pages=group.sink_pages if group.coded else 0,
                note=_note(config, group),
                pages=sum(store.spec.pages for store in stores),
                bytes=size,
                attention=serving(stores, q_tokens=1),
                prefill=serving(stores, q_tokens=PREFILL_TOKENS),
                write=_writing(stores, platform),
                quantize=_quantizing(stores, platform),
            )
        )
    return reports


def _serving(
    stores: list[Store], *, q_tokens: int, backend: Backend | None, platform: str | None
) -> Backend:
    """The backend that attends a group; if it has two stores, the one that attends the codes.

    One query head per kv head is assumed: a cache does not know how many the model has.
    """
    pages = stores[-1].pages
    heads = pages.dims["kv_heads"]
    return choose(backend, pages, q_tokens=q_tokens, q_heads=heads, platform=platform)


def _writing(stores: list[Store], platform: str | None) -> Backend:
    """The backend that writes new tokens; if both stores take them, the one that writes codes."""
    written = [store.pages for store in stores if isinstance(store.spec.fill, TokenFill)]
    return choose_writer(None, written[-1], platform=platform)


def _quantizing(stores: list[Store], platform: str | None) -> Backend | None:
    """The backend that turns exact pages into codes; None where there are no codes."""
    pages = stores[-1].pages
    return choose_quantizer(None, pages, platform=platform) if pages.coded else None


def _note(config: CacheConfig, group: LayerGroup) -> str:
    """Names lossy codecs that were asked for but not used: exact pages hold the whole window."""
    asked = {config.layers[layer].kv_codec for layer in group.layers}
    vain = [c for c in sorted(asked, key=lambda c: c.name) if c.lossy and not group.coded]
    return "; ".join(
        f"not {c.name}: the window lies within its {c.recent_pages} exact pages" for c in vain
    )
