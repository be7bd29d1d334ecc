"""The static description of a decoder-only transformer.

It is the same for all architectures: `models/families` builds it from a checkpoint's config.json.
"""

import dataclasses
from typing import Literal

from jaxkv import LayerSpec
from jaxkv.codecs import KVCodec
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
