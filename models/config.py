"""What a decoder-only transformer is made of, after a checkpoint's own config has been read."""

import dataclasses
from typing import Literal

from jaxkv import Keep, LayerSpec
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

    def layer_specs(self, keep: Keep = Keep()) -> tuple[LayerSpec, ...]:
        """Describes every layer to the cache; exact pages are bfloat16 unless `keep` says else.

        Raises:
          ValueError: the layers can't be kept so, see `Keep.apply`.
        """
        return keep.apply(
            [
                LayerSpec(kv_heads=self.kv_heads, head_dim=self.head_dim, window=window)
                for window in self.windows
            ]
        )
