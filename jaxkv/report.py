"""Says which code serves which layer, and what each group of layers stores."""

import dataclasses

from jaxkv.config import CacheConfig
from jaxkv.sizing import plan
from pallas_kernels import paged_attention, write_pages
from pallas_kernels.backends import Backend, choose_backend


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupReport:
    """One layer group: what it keeps, and who reads and writes it."""

    layers: tuple[int, ...]
    window: int | None
    sink_tokens: int
    sink_positions: str
    codec: str
    dtype: str
    pages: int
    bytes: int
    attention: Backend
    write: Backend

    def __str__(self) -> str:
        numbers = self.layers
        run = numbers == tuple(range(numbers[0], numbers[-1] + 1))
        name = f"{numbers[0]}-{numbers[-1]}" if run else ",".join(map(str, numbers))
        sees = "all tokens" if self.window is None else f"window {self.window}"
        if self.sink_tokens:
            sees += f" + {self.sink_tokens} sink tokens ({self.sink_positions} positions)"
        return (
            f"layers {name}: {sees}; {self.codec} {self.dtype}, {self.pages} pages, "
            f"{self.bytes / 2**20:.1f} MiB; attention {self.attention}, write {self.write}"
        )


def explain(
    config: CacheConfig, *, backend: Backend | None = None, platform: str | None = None
) -> list[GroupReport]:
    """Tells what `KVCache.attend` will run for each layer group, without running it.

    Args:
      config: of the cache.
      backend: as given to `attend`.
      platform: "cpu", "gpu" or "tpu"; None for JAX's default.

    Raises:
      ValueError: the configuration can't be.
      NotImplementedError: the named backend does not serve it.
    """
    config = config.checked()
    attention = choose_backend("paged_attention", backend, paged_attention.BACKENDS, platform)
    write = choose_backend("write_pages", None, write_pages.BACKENDS, platform)
    return [
        GroupReport(
            layers=group.layers,
            window=group.spec.window,
            sink_tokens=group.spec.sink_tokens,
            sink_positions=group.spec.sink_positions,
            codec=group.spec.codec,
            dtype=group.spec.dtype,
            pages=group.pages,
            bytes=size,
            attention=attention,
            write=write,
        )
        for group, size in zip(config.groups, plan(config).groups, strict=True)
    ]
