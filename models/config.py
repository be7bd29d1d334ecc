"""What a decoder-only transformer is made of, after a checkpoint's own config has been read."""

import dataclasses
from typing import Literal

from jaxkv import LayerSpec
from jaxkv.codecs import KVCodec
from models.experts import ExpertsConfig
from models.rope import Rope

Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Static description of a `Decoder`; each architecture's module makes one.

    Attributes:
      intermediate_size: of the MLP, or of each expert.
      windows: one entry a layer, tokens a query sees or None for all.
      rope: rotation of the layers.
      local_rope: rotation of the layers that have a window, where it differs (Gemma 3).
      attention_scale: of scores; None for `head_dim ** -0.5`.
      attention_soft_cap: bound on scores, `cap * tanh(score / cap)` (Gemma 2); None for none.
      logits_soft_cap: the same on the final logits.
      attention_sinks: every query head has a learned logit that joins the softmax's denominator
        (gpt-oss).
      attention_bias: q, k and v projections have biases.
      output_bias: the attention's output projection has one.
      activation: of the MLP's gate.
      mlp_bias: the MLP's projections have them.
      experts: a mixture of experts takes the MLP's place (gpt-oss); None for the MLP.
      qk_norm: RMS norm of each query and key head before rotation (Qwen3, Gemma 3).
      sandwich_norms: attention and MLP have a norm behind them too (Gemma 2 and 3).
      unit_offset_norms: norms multiply by `1 + weight`, not `weight` (Gemma).
      scale_embeddings: embeddings are multiplied by `sqrt(hidden_size)` (Gemma).
      tie_embeddings: the output matrix is the embedding.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope: Rope
    norm_eps: float
    local_rope: Rope | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    attention_sinks: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    activation: Activation = "silu"
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None
    qk_norm: bool = False
    sandwich_norms: bool = False
    unit_offset_norms: bool = False
    scale_embeddings: bool = False
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    max_position: int | None = None  # trained context, tokens

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.windows)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Each layer's rotation."""
        local = self.local_rope or self.rope
        return tuple(self.rope if window is None else local for window in self.windows)

    @property
    def period(self) -> int:
        """Layers after which the pattern of windows repeats; the last repeat may be cut short.

        Nothing but the window tells layers apart: the rotation follows from it.
        """
        repeats = lambda n: self.windows[n:] == self.windows[:-n]
        return next((n for n in range(1, self.layers) if repeats(n)), self.layers)

    def layer_specs(
        self,
        *,
        dtype: str,
        window: int | None = None,
        sink_tokens: int = 0,
        sink_positions: str = "original",
        codec: str | KVCodec = "exact",
        keep_first: int = 0,
        keep_last: int = 0,
    ) -> tuple[LayerSpec, ...]:
        """Describes every layer to the cache.

        Args:
          dtype: float type of the pages.
          window: narrows every layer to at most so many tokens (streaming); None leaves them.
          sink_tokens: first tokens kept beside each window.
          sink_positions: as in `LayerSpec`.
          codec: of every layer's pages, a name or a `KVCodec`.
          keep_first: so many of the first layers stay exact.
          keep_last: so many of the last ones.

        Raises:
          ValueError: sinks were asked for and no layer has a window, or there are not as many
            layers as shall stay exact.
        """
        windows = [
            min((w for w in (own, window) if w is not None), default=None) for own in self.windows
        ]
        if (sink_tokens or sink_positions != "original") and set(windows) == {None}:
            raise ValueError(f"{sink_tokens=} needs a window, and no layer has one.")
        if not (keep_first >= 0 and keep_last >= 0 and keep_first + keep_last <= self.layers):
            raise ValueError(f"{keep_first=}, {keep_last=} must name some of {self.layers} layers.")
        coded = range(keep_first, self.layers - keep_last)
        return tuple(
            LayerSpec(
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                window=own,
                sink_tokens=0 if own is None else sink_tokens,
                sink_positions="original" if own is None else sink_positions,  # type: ignore[arg-type]
                codec=codec if layer in coded else "exact",
                dtype=dtype,
            )
            for layer, own in enumerate(windows)
        )
