"""Which tokens a cache keeps and how it stores them, said once for all layers of a model."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jax.typing import DTypeLike

from jaxkv.arguments import float_name
from jaxkv.codecs import KVCodec
from jaxkv.spec import EXACT, LayerSpec
from pallas_kernels.checks import whole_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """What the cache keeps of a model's keys and values; `Keep()` keeps everything exactly.

    Attributes:
      codec: how pages are stored, a name (`jaxkv.codecs.codec_names()`: "exact", "tq4", "int8",
        ...) or a `KVCodec`.
      window: narrows every layer to the newest `window` tokens, so that memory is constant for any
        length; None leaves each layer its own window. Layers with a smaller one keep theirs.
      sink_tokens: first tokens kept beside each window (StreamingLLM, arXiv:2309.17453).
      sink_positions: "original", or "cache" for streams longer than the trained context, see
        `LayerSpec`.
      keep_first: number of first layers that stay exact whatever the codec.
      keep_last: number of last layers that stay exact.
      dtype: float type of exact pages, as in `LayerSpec`; None for the model's.
    """

    codec: str | KVCodec = EXACT
    window: int | None = None
    sink_tokens: int = 0
    sink_positions: Literal["original", "cache"] = "original"
    keep_first: int = 0
    keep_last: int = 0
    dtype: DTypeLike | None = None

    def __post_init__(self):
        if self.dtype is not None:
            object.__setattr__(self, "dtype", float_name("dtype", self.dtype))

    def apply(self, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
        """Returns the specs of a model's layers, changed to keep what this value describes.

        Args:
          layers: one spec per layer with the model's heads, windows and float type.

        Raises:
          ValueError: sinks were asked for and no layer has a window, or there are fewer layers
            than are to stay exact.
        """
        if self.window is not None:
            whole_number("window", self.window, least=1)
        for name in ("sink_tokens", "keep_first", "keep_last"):
            whole_number(name, getattr(self, name), least=0)
        windows = [_smaller(spec.window, self.window) for spec in layers]
        sink_tokens, keep_first, keep_last = self.sink_tokens, self.keep_first, self.keep_last
        has_sinks = sink_tokens or self.sink_positions != "original"
        if has_sinks and all(window is None for window in windows):
            raise ValueError(f"{sink_tokens=} needs a window, and no layer has one.")
        if keep_first + keep_last > len(layers):
            raise ValueError(f"{keep_first=}, {keep_last=} must name some of {len(layers)} layers.")
        coded = range(keep_first, len(layers) - keep_last)
        return tuple(
            dataclasses.replace(
                spec,
                window=window,
                sink_tokens=0 if window is None else sink_tokens,
                sink_positions="original" if window is None else self.sink_positions,
                codec=self.codec if number in coded else EXACT,
                dtype=self.dtype or spec.dtype,
            )
            for number, (spec, window) in enumerate(zip(layers, windows, strict=True))
        )


def _smaller(a: int | None, b: int | None) -> int | None:
    """The smaller of two windows; None stands for no window."""
    return min((window for window in (a, b) if window is not None), default=None)
