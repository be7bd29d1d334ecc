"""Static, hashable description of how one attention layer keeps its keys and values."""

import dataclasses
from typing import Literal

from pallas_kernels.codecs.codec import KVCodec
from pallas_kernels.codecs.presets import get_codec

EXACT = "exact"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """How one attention layer keeps its keys and values.

    Attributes:
      kv_heads: number of key/value heads.
      head_dim: channels per head.
      window: tokens a query sees, itself included (sliding-window attention); None for all.
      sink_tokens: number of first tokens that are kept beside the window (StreamingLLM,
        arXiv:2309.17453).
      sink_positions: "original"; or "cache": sink keys are attended by a query rotated to its
        place inside the cache, so that no distance exceeds `sink_tokens + window`.
      codec: how pages are stored, a name (`jaxkv.codecs.codec_names()`) or a `KVCodec`; "exact"
        keeps `dtype`. A lossy codec says how many of the newest pages and first tokens stay exact;
        if the window lies within the newest pages, the whole layer is exact.
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
        _ = self.kv_codec  # raises for an unknown name
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={self.dtype!r} must be bfloat16, float16 or float32.")
        return self

    @property
    def kv_codec(self) -> KVCodec:
        """The codec itself; raises ValueError for an unknown name."""
        return get_codec(self.codec) if isinstance(self.codec, str) else self.codec

    @property
    def q_sink_limit(self) -> int | None:
        """Largest position that `q_sink` is rotated for; None if sinks are attended by `q`."""
        if self.sink_positions == "original" or self.window is None:
            return None
        return self.sink_tokens + self.window - 1
