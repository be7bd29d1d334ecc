"""The static description of a decoder-only transformer.

It is the same for all architectures: `models/families` builds it from a checkpoint's config.json.
"""

import dataclasses
from typing import Literal

from jaxkv import Keep, LayerSpec
from models.experts import ExpertsConfig
from models.rope import Rope

Activation = Literal["silu", "gelu_tanh"]
QkNorm = Literal["head", "channels"]
NormPlaces = Literal["before", "after", "both"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Static description of a `Decoder`.

    Attributes:
      architecture: `model_type` of the config.json.
      intermediate_size: inner size of the MLP.
      windows: one entry per layer: the number of tokens that a query sees, itself included, or
        None for all.
      rope: rotation of queries and keys.
      norm_eps: added to the mean square in the RMS norms.
      local_rope: rotation in the layers that have a window, if it differs from `rope` (Gemma 3).
      rotated: one entry per layer: False where queries and keys are not rotated, so that attention
        does not see positions (SmolLM3); None if all layers are rotated.
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
      experts: description of the mixture of experts that takes the MLP's place; None for an MLP.
      expert_size: inner size of each expert; None for `intermediate_size`.
      sparse: one entry per layer: True where the mixture takes the MLP's place; None for all layers
        if there are experts.
      qk_norm: queries and keys pass an RMS norm before their rotation: "head", each head on its own
        (Qwen3, Gemma 3), or "channels", the channels of all heads together (OLMo 2); None for none.
      norm_places: where attention and MLP have norms: "before" (on their inputs), "after" (on what
        they add to the residual stream, OLMo 2), or "both" (Gemma 2, 3).
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
    rotated: tuple[bool, ...] | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    attention_sinks: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    activation: Activation = "silu"
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None
    expert_size: int | None = None
    sparse: tuple[bool, ...] | None = None
    qk_norm: QkNorm | None = None
    norm_places: NormPlaces = "before"
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
        """Each layer's rotation; that of layers that are not rotated turns by angle 0."""
        local, still = self.local_rope or self.rope, Rope(frequencies=(0.0,) * (self.head_dim // 2))
        rotated = self.rotated or (True,) * self.layers
        return tuple(
            still if not turns else self.rope if window is None else local
            for turns, window in zip(rotated, self.windows, strict=True)
        )

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """For each layer, whether a mixture of experts takes the MLP's place."""
        return self.sparse or (self.experts is not None,) * self.layers

    @property
    def period(self) -> int:
        """Number of layers after which the pattern of layers repeats.

        The last repeat may be cut short. Layers differ in nothing but the window, the rotation, and
        whether they have an MLP or experts.
        """
        kinds = list(zip(self.windows, self.ropes, self.sparse_layers, strict=True))
        repeats = lambda n: kinds[n:] == kinds[:-n]
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
