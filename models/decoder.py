"""A decoder-only transformer over a `KVCache`: one body for the Llama family."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkv import KVCache, LayerSpec
from models.config import DecoderConfig
from models.layers import Block, RMSNorm
from models.rope import angles
from pallas_kernels.backends import Backend


class Decoder(nnx.Module):
    """Embedding, blocks, final norm. `Decoder.__call__` gives hidden states, `unembed` logits.

    Args:
      config: the architecture.
      rngs: for random weights; loaders replace them.
      scan: stack the layers and scan over them, so that compile time does not grow with depth;
        False unrolls, which reads weights in place and is faster where a step is short (CPU).
      dtype: of the weights and activations.
    """

    def __init__(
        self, config: DecoderConfig, rngs: nnx.Rngs, *, scan: bool = True, dtype="float32"
    ):
        dtype = jnp.dtype(dtype)
        if scan and len(set(config.windows)) > 1:
            raise ValueError("scan=True needs layers with one window; use scan=False.")
        self.config, self.scan = config, scan
        table = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), table, dtype))
        if scan:
            self.layers = Block(config, rngs, stack=(config.layers,), dtype=dtype)
        else:
            self.layers = nnx.List([Block(config, rngs, dtype=dtype) for _ in config.windows])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, stack=(), dtype=dtype)
        self.head = (
            None
            if config.tie_embeddings
            else nnx.Param(jax.random.normal(rngs.params(), table, dtype))
        )

    @property
    def dtype(self):
        """Float type of weights and activations."""
        return self.embedding.get_value().dtype

    def layer_specs(self, *, dtype: str | None = None, **options) -> tuple[LayerSpec, ...]:
        """Describes the layers to a cache; options as in `DecoderConfig.layer_specs`."""
        return self.config.layer_specs(dtype=dtype or str(self.dtype), **options)

    def __call__(
        self, tokens: jax.Array, cache: KVCache, *, backend: Backend | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Runs the prepared tokens of each sequence through the layers.

        Args:
          tokens: `i32[batch, tokens]`; rows past `cache.pending` are padding.
          cache: prepared; commit it afterwards.
          backend: of the attention; None picks by platform.

        Returns:
          Normed hidden states, `[batch, tokens, hidden]`, and the cache.
        """
        x = self.embedding[...][tokens]
        position = cache.positions(tokens.shape[1])
        rope = self.config.rope
        turned = angles(rope, position)
        limits = [spec.q_sink_limit for spec in cache.config.layers]
        sink_turned = {
            limit: None if limit is None else angles(rope, jnp.minimum(position, limit))
            for limit in set(limits)
        }
        if isinstance(self.layers, Block):
            if len(cache.config.groups) != 1:
                raise ValueError("a scanned Decoder needs a cache whose layers are all alike.")
            graph, stacked = nnx.split(self.layers)

            def body(carry, weights_and_index):
                weights, index = weights_and_index
                block = nnx.merge(graph, weights)
                x, cache = carry
                return block(x, cache, (0, index), turned, sink_turned[limits[0]], backend), None

            index = jnp.arange(self.config.layers, dtype=jnp.int32)
            (x, cache), _ = jax.lax.scan(body, (x, cache), (stacked, index))
        else:
            for layer, block in enumerate(self.layers):
                x, cache = block(x, cache, layer, turned, sink_turned[limits[layer]], backend)
        return self.norm(x), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits, `f32[..., vocab]`, of hidden states `[..., hidden]`."""
        table = (self.embedding if self.head is None else self.head)[...]
        contract = (((hidden.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(hidden, table, contract, preferred_element_type=jnp.float32)
