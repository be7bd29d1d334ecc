"""Options that say what the cache keeps, and the `jaxkv.Keep` that they make."""

import dataclasses
from typing import Literal

import jaxkv
from jaxkv.codecs import KVCodec, get_codec
from scripts.shared.options import Names, check_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """Which tokens the cache keeps."""

    window: int | None = None
    """Tokens that a query sees, the newest ones: constant memory for any length.
    None: as many as the model sees."""
    sink_tokens: int | None = None
    """First tokens kept beside the window for ever (StreamingLLM; 4 is usual)."""

    def keep(self, codec: str | KVCodec = "exact", *, dtype: str | None = None) -> jaxkv.Keep:
        """What the options ask for, with pages stored by `codec`."""
        return jaxkv.Keep(
            codec=codec, dtype=dtype, window=self.window, sink_tokens=self.sink_tokens or 0
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepOptions(WindowOptions):
    """Which tokens the cache keeps, and in which layers it keeps them exact."""

    sink_positions: Literal["original", "cache"] = "original"
    """'cache' keeps sinks at a bounded distance, for streams past the trained context."""
    keep_first: int = 0
    """Number of first layers that stay exact whatever the codec."""
    keep_last: int = 0
    """Number of last layers that stay exact whatever the codec."""

    def keep(self, codec: str | KVCodec = "exact", *, dtype: str | None = None) -> jaxkv.Keep:
        """What the options ask for, with pages stored by `codec`."""
        return dataclasses.replace(
            super().keep(codec, dtype=dtype),
            sink_positions=self.sink_positions,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecsOptions(KeepOptions):
    """Codecs to compare, which tokens the cache keeps, and which of them stay exact."""

    codec: Names = ()
    """Name of a codec; repeat for several. Default: all, which `generate.py --kv help` lists."""
    recent_pages: int | None = None
    """Newest pages that stay exact. None: as each codec defines (published ones: 0)."""
    sink_tokens: int | None = None
    """First tokens that stay exact, and beside --window for ever (StreamingLLM; 4 is usual).
    None: exact ones as each codec defines, and none beside --window."""

    def keep(self, codec: str | KVCodec = "exact", *, dtype: str | None = None) -> jaxkv.Keep:
        """What the options ask for; without a window, sink tokens are the codec's alone."""
        kept = super().keep(codec, dtype=dtype)
        return kept if self.window is not None else dataclasses.replace(kept, sink_tokens=0)

    def choose(self, names: tuple[str, ...]) -> dict[str, KVCodec]:
        """The codecs of these names, in order, with --recent-pages and --sink-tokens in them.

        Raises:
          ValueError: an unknown name, or a number that a codec can't take.
        """
        check_least(self, "recent_pages", "sink_tokens", least=0)
        changes = {"recent_pages": self.recent_pages, "sink_tokens": self.sink_tokens}
        changes = {name: value for name, value in changes.items() if value is not None}
        chosen = {}
        for name in names:
            codec = get_codec(name)
            if self.recent_pages == 0 and codec.key_mean == "page":
                raise ValueError(
                    f"--recent-pages 0 must be at least 1 for codec {name!r}: it removes a page's "
                    "mean when the page is complete (choose other codecs with --codec)."
                )
            chosen[name] = dataclasses.replace(codec, **changes) if codec.lossy else codec
        return chosen
