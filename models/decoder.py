"""A decoder-only transformer over a `KVCache`, one class for all architectures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkv import Keep, KVCache, LayerSpec
from models.config import DecoderConfig
from models.experts import ExpertParam
from models.layers import Angles, Block, make_norm, soft_cap
from models.pattern import pattern_places
from models.rope import angles
from pallas_kernels.backends import Backend


class Decoder(nnx.Module):
    """Embedding, blocks, final norm: a `jaxkv.Model`. Calling it gives hidden states.

    The windows of the layers form a repeating pattern (Gemma 3: five layers with a window, one
    without). With `scan`, the layers at the same place of the pattern are stacked, and a scan runs
    over the repeats, so that compile time does not grow with depth. `pattern` then has one stacked
    block per place, and `layers` has the blocks of a last repeat that is cut short. Without `scan`,
    `pattern` is empty and `layers` has all blocks.

    Args:
      config: the architecture.
      rngs: source of the random weights; a loader replaces them.
      scan: True to stack and scan, False to unroll. Unrolled layers read their weights in place,
        which is faster where a step is short (CPU).
      dtype: of weights and activations.
    """

    def __init__(
        self, config: DecoderConfig, rngs: nnx.Rngs, *, scan: bool = True, dtype="float32"
    ):
        dtype = jnp.dtype(dtype)
        if config.scale_embeddings and dtype == jnp.float16:
            raise ValueError(
                f"dtype=float16 can't hold the hidden states of {config.architecture!r}, "
                "which pass 65,504: use bfloat16 or float32."
            )
        self.config, self.scan = config, scan
        self.repeats = config.layers // config.period if scan else 0
        table = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), table, dtype))
        stacked = range(config.period if scan else 0)
        single = range(self.repeats * config.period, config.layers)
        block = lambda number, stack: Block(
            config, rngs, stack=stack, dtype=dtype, sparse=config.sparse_layers[number]
        )
        self.pattern = nnx.List([block(number, (self.repeats,)) for number in stacked])
        self.layers = nnx.List([block(number, ()) for number in single])
        self.norm = make_norm(config, config.hidden_size, stack=(), dtype=dtype)
        self.head = (
            None
            if config.tie_embeddings
            else nnx.Param(jax.random.normal(rngs.params(), table, dtype))
        )

    @property
    def dtype(self):
        """Float type of weights and activations."""
        return self.embedding.get_value().dtype

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.config.vocab_size

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence, as the checkpoint's config says."""
        return self.config.eos_ids

    @property
    def max_position(self) -> int | None:
        """Trained context in tokens; None where the checkpoint does not say."""
        return self.config.max_position

    def layer_specs(self, keep: Keep = Keep()) -> tuple[LayerSpec, ...]:
        """Describes the layers to a cache; raises ValueError as `Keep.apply` does."""
        dtype = keep.dtype or str(self.dtype)
        return self.config.layer_specs(dataclasses.replace(keep, dtype=dtype))

    def __call__(
        self, tokens: jax.Array, cache: KVCache, *, backend: Backend | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Runs the prepared tokens of each sequence through the layers.

        Args:
          tokens: `i32[batch, tokens]`; in each sequence tokens past `cache.pending` are padding.
          cache: a cache after `prepare`; the caller commits it afterwards.
          backend: backend of the attention; None picks by platform.

        Returns:
          Hidden states after the final norm, `[batch, tokens, hidden]`, and the cache.

        Raises:
          ValueError: the cache does not fit: it has another number of layers, or it keeps layers
            in different ways that the scan treats as one.
        """
        config = self.config
        if len(cache.config.layers) != config.layers:
            raise ValueError(
                f"the cache has {len(cache.config.layers)} layers and must have {config.layers}."
            )
        x = self.embedding[...][tokens]
        if config.scale_embeddings:  # published checkpoints expect the factor rounded like weights
            x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        turned = self._angles(cache, tokens.shape[1])
        if self.repeats:
            x, cache = self._scan(x, cache, turned, backend)
        for number, block in enumerate(self.layers, start=self.repeats * config.period):
            group, index = cache.config.locate(number)
            x, cache = _run_block(
                block, x, cache, jnp.int32(index), *turned[number], group=group, backend=backend
            )
        return self.norm(x), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits, `f32[..., vocab]`, of hidden states `[..., hidden]`."""
        table = (self.embedding if self.head is None else self.head)[...]
        contract = (((hidden.ndim - 1,), (1,)), ((), ()))
        logits = jax.lax.dot_general(hidden, table, contract, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.config.logits_soft_cap)

    def _angles(self, cache: KVCache, tokens: int) -> list[tuple[Angles, Angles | None]]:
        """Each layer's rotation of queries and keys, and that of its queries toward sink tokens.

        The second is None in layers where queries attend sink tokens with the rotation that they
        have for other tokens. Layers that are rotated alike share their arrays.
        """
        position = cache.positions(tokens)
        kinds = [
            (rope, spec.q_sink_limit)
            for rope, spec in zip(self.config.ropes, cache.config.layers, strict=True)
        ]
        turned = {rope: angles(rope, position) for rope, _ in dict.fromkeys(kinds)}
        sink_turned = {
            (rope, limit): None if limit is None else angles(rope, jnp.minimum(position, limit))
            for rope, limit in dict.fromkeys(kinds)
        }
        return [(turned[kind[0]], sink_turned[kind]) for kind in kinds]

    def _scan(
        self,
        x: jax.Array,
        cache: KVCache,
        turned: list[tuple[Angles, Angles | None]],
        backend: Backend | None,
    ) -> tuple[jax.Array, KVCache]:
        """Scans over the whole repeats of the pattern; its body runs the layers of one repeat."""
        places = pattern_places(cache.config, self.config.period, self.repeats)
        # Experts are not scanned: slicing out a layer would copy all its experts to read a few.
        graph, experts, stacked = nnx.split(self.pattern, ExpertParam, ...)

        def body(carry, weights_and_repeat):
            weights, repeat = weights_and_repeat
            x, cache = carry
            blocks = nnx.merge(graph, experts, weights)
            for number, (block, place) in enumerate(zip(blocks, places, strict=True)):
                layer = (place.group, repeat * place.stride + place.first)
                x, cache = block(x, cache, layer, *turned[number], backend, place=repeat)
            return (x, cache), None

        repeats = jnp.arange(self.repeats, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(body, (x, cache), (stacked, repeats))
        return x, cache


@functools.partial(jax.jit, static_argnames=("group", "backend"))
def _run_block(
    block: Block,
    x: jax.Array,
    cache: KVCache,
    index: jax.Array,
    angles: Angles,
    sink_angles: Angles | None,
    *,
    group: int,
    backend: Backend | None,
) -> tuple[jax.Array, KVCache]:
    """One block, layer `index` of `group`, as a program of its own that layers share.

    Blocks of equal structure whose layers are in one group are traced and lowered once. XLA inlines
    the calls, so that each layer still reads its weights in place and writes the donated cache.
    """
    return block(x, cache, (group, index), angles, sink_angles, backend)
