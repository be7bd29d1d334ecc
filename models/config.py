"""The static description of a decoder-only transformer.

It is the same for all architectures: `models/families` builds it from a checkpoint's config.json.
"""

import dataclasses
from typing import Literal

from jaxkv import Keep, LayerSpec
from models.experts import ExpertsConfig
from models.rope import Rope

Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Static description of a `Decoder`.

    Attributes:
      architecture: `model_type` of the config.json.
      intermediate_size: inner size of the MLP, or of each expert.
      windows: one entry per layer: the number of tokens that a query sees, itself included, or
        None for all.
      rope: rotation of queries and keys.
      norm_eps: added to the mean square in the RMS norms.
      local_rope: rotation in the layers that have a window, if it differs from `rope` (Gemma 3).
      attention_scale: factor of attention scores; None for `head_dim ** -0.5`.
      attention_soft_cap: bound on attention scores, `cap * tanh(score / cap)` (Gemma 2); None for
        no bound.
      logits_soft_cap: the same for the final logits.
      attention_sinks: every query head has a learned logit that is added to the softmax's
        denominator (gpt-oss).
      attention_bias: the projections to q, k and v have biases.
      output_bias: the attention's output projection has a bias.
      activation: activation function of the MLP's gate.
      mlp_bias: the MLP's projections have biases.
      experts: description of the mixture of experts that takes the MLP's place (gpt-oss); None
        for an MLP.
      qk_norm: each query and key head passes an RMS norm before its rotation (Qwen3, Gemma 3).
      sandwich_norms: there are norms after attention and MLP, too, not only before (Gemma 2, 3).
      unit_offset_norms: norms multiply by `1 + weight`, not `weight` (Gemma).
      scale_embeddings: embeddings are multiplied by `sqrt(hidden_size)` (Gemma).
      tie_embeddings: the output matrix is the embedding.
      eos_ids: each of these tokens ends a generation.
      max_position: length of the context in training, in tokens; None if the file does not say.
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
    max_position: int | None = None

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.windows)

    @property
    def group(self) -> int:
        """Number of query heads that share a key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Each layer's rotation."""
        local = self.local_rope or self.rope
        return tuple(self.rope if window is None else local for window in self.windows)

    @property
    def period(self) -> int:
        """Number of layers after which the pattern of windows repeats.

        The last repeat may be cut short. Layers differ in nothing but the window and what depends
        on it, the rotation.
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
