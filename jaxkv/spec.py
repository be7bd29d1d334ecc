"""Static, hashable description of how one attention layer keeps its keys and values."""

import dataclasses
from typing import Literal

from jax.typing import DTypeLike

from jaxkv.arguments import float_name
from pallas_kernels.checks import MOST_INT, shown, whole_number
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
      dtype: float type of exact pages: "bfloat16", "float16" or "float32", also as a type of JAX
        or numpy (`jnp.bfloat16`); the spec keeps its name.
    """

    kv_heads: int
    head_dim: int
    window: int | None = None
    sink_tokens: int = 0
    sink_positions: Literal["original", "cache"] = "original"
    codec: str | KVCodec = EXACT
    dtype: DTypeLike = "bfloat16"

    def __post_init__(self):
        # Specs that mean the same are equal, and so share a group.
        object.__setattr__(self, "dtype", float_name("dtype", self.dtype))

    def checked(self) -> "LayerSpec":
        """Returns itself; raises ValueError for a value that makes no sense."""
        for name in ("kv_heads", "head_dim"):
            whole_number(name, getattr(self, name), least=1)
        if self.window is not None:
            whole_number("window", self.window, least=1, hint=", or None for all tokens")
        whole_number("sink_tokens", self.sink_tokens, least=0)
        if self.window is not None and self.window + self.sink_tokens > MOST_INT:
            raise ValueError(
                f"window={self.window} and sink_tokens={self.sink_tokens} must be below 2**31 "
                "together."
            )
        if not isinstance(self.codec, str | KVCodec):
            raise ValueError(f"codec={shown(self.codec)} must be a codec's name or a KVCodec.")
        if self.sink_positions not in ("original", "cache"):
            raise ValueError(f"sink_positions={shown(self.sink_positions)}: 'original' or 'cache'.")
        if self.sink_positions == "cache" and self.window is None:
            raise ValueError("sink_positions='cache' needs a window, and window=None.")
        _ = self.kv_codec  # raises for an unknown name
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
