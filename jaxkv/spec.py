"""What one attention layer keeps of its keys and values: a static, hashable description."""

import dataclasses
from typing import Literal

from pallas_kernels.codecs.codec import KVCodec
from pallas_kernels.codecs.presets import get_codec

EXACT = "exact"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """How one attention layer keeps its keys and values.

    Attributes:
      kv_heads: key/value heads.
      head_dim: channels of one head.
      window: tokens a query sees, itself included; None for all (sliding-window attention).
      sink_tokens: first tokens kept beside the window until the sequence is freed (StreamingLLM).
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
