"""The pieces of a decoder block.

Modules own weights only: the cache is an argument, and the new cache is a result. `stack` are
leading axes of every parameter: `(layers,)` for blocks that are scanned, `()` for a single one.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkv import KVCache
from jaxkv.config import Layer
from models.config import Activation, DecoderConfig
from models.experts import Experts
from models.rope import rotate
from pallas_kernels.backends import Backend

Stack = tuple[int, ...]
Angles = tuple[jax.Array, jax.Array]  # cosine and sine, as models.rope.angles gives them

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def _weight(rngs: nnx.Rngs, shape: Stack, dtype, fan_in: int) -> nnx.Param:
    scale = jnp.asarray(fan_in**-0.5, dtype)
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale)


def _bias(present: bool, shape: Stack, dtype) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape, dtype)) if present else None


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., a] @ w[a, ...]`, over one axis."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Bounds `x` smoothly: `cap * tanh(x / cap)` (Gemma 2, arXiv:2408.00118); None for no bound."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight`, computed in float32 (arXiv:1910.07467).

    With `unit_offset` the factor is `1 + weight`. The sum is float32 as well: in bfloat16 most of a
    small weight would be lost.
    """

    def __init__(self, size: int, eps: float, *, stack: Stack, dtype, unit_offset: bool):
        start = jnp.zeros if unit_offset else jnp.ones
        self.weight = nnx.Param(start((*stack, size), dtype))
        self.eps, self.unit_offset = eps, unit_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32) + (1 if self.unit_offset else 0)
        return (y * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def make_norm(config: DecoderConfig, size: int, *, stack: Stack, dtype) -> RMSNorm:
    """The norm that the architecture uses, for vectors of `size` numbers."""
    offset = config.unit_offset_norms
    return RMSNorm(size, config.norm_eps, stack=stack, dtype=dtype, unit_offset=offset)


def norm_heads(norm: RMSNorm, x: jax.Array) -> jax.Array:
    """Normalises `[batch, tokens, heads, head_dim]`, in runs of as many channels as `norm` has."""
    size = norm.weight[...].shape[-1]
    return norm(x.reshape(*x.shape[:2], -1, size)).reshape(x.shape)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) over a `KVCache`.

    The projections to q, k and v are one matrix, `[hidden, kv_heads, group + 2, head_dim]`, so that
    activations are read once. The kv heads have an axis of their own, which can be sharded.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, stack: Stack, dtype):
        heads = (config.kv_heads, config.group + 2, config.head_dim)
        self.qkv = _weight(rngs, (*stack, config.hidden_size, *heads), dtype, config.hidden_size)
        self.qkv_bias = _bias(config.attention_bias, (*stack, *heads), dtype)
        out = (*stack, config.q_heads * config.head_dim, config.hidden_size)
        self.out = _weight(rngs, out, dtype, out[-2])
        self.out_bias = _bias(config.output_bias, (*stack, config.hidden_size), dtype)
        together = config.qk_norm == "channels"  # heads that a norm takes together, else one
        norm = lambda heads: make_norm(
            config, config.head_dim * (heads if together else 1), stack=stack, dtype=dtype
        )
        self.q_norm = norm(config.q_heads) if config.qk_norm else None
        self.k_norm = norm(config.kv_heads) if config.qk_norm else None
        sinks = config.attention_sinks
        self.sinks = _bias(sinks, (*stack, config.q_heads), dtype)  # learned sink logits
        self.group = config.group
        self.scale, self.soft_cap = config.attention_scale, config.attention_soft_cap

    def __call__(
        self,
        x: jax.Array,
        cache: KVCache,
        layer: Layer,
        angles: Angles,
        sink_angles: Angles | None,
        backend: Backend | None,
    ) -> tuple[jax.Array, KVCache]:
        """Maps `[batch, tokens, hidden]` to the same shape; returns it and the new cache.

        Args:
          x: the tokens.
          cache: prepared; the keys and values of `x` are written to it.
          layer: which layer of the cache this is: its number, or a group and a place in it.
          angles: rotation of queries and keys.
          sink_angles: rotation of queries toward sink tokens; None if it is the same.
          backend: backend of the attention; None picks by platform.
        """
        qkv = dot(x, self.qkv[...])  # [batch, tokens, kv_heads, group + 2, head_dim]
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...][None, None]
        batch, tokens, _, _, head_dim = qkv.shape
        q = qkv[:, :, :, : self.group].reshape(batch, tokens, -1, head_dim)
        k, v = qkv[:, :, :, self.group], qkv[:, :, :, self.group + 1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = norm_heads(self.q_norm, q), norm_heads(self.k_norm, k)
        cache, out = cache.attend(
            layer,
            rotate(q, angles),
            rotate(k, angles),
            v,
            scale=self.scale,
            soft_cap=self.soft_cap,
            sink_logits=None if self.sinks is None else self.sinks[...].astype(jnp.float32),
            q_sink=None if sink_angles is None else rotate(q, sink_angles),
            backend=backend,
        )
        y = dot(out.reshape(batch, tokens, -1), self.out[...])
        if self.out_bias is not None:
            y = y + self.out_bias[...][None, None]
        return y, cache


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (arXiv:2002.05202); gate and up are one matrix."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, stack: Stack, dtype):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = _weight(rngs, (*stack, hidden, 2, inner), dtype, hidden)
        self.gate_up_bias = _bias(config.mlp_bias, (*stack, 2, inner), dtype)
        self.down = _weight(rngs, (*stack, inner, hidden), dtype, inner)
        self.down_bias = _bias(config.mlp_bias, (*stack, hidden), dtype)
        self.activation: Activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, tokens, hidden]` to the same shape."""
        y = dot(x, self.gate_up[...])
        if self.gate_up_bias is not None:
            y = y + self.gate_up_bias[...][None, None]
        y = dot(ACTIVATIONS[self.activation](y[:, :, 0]) * y[:, :, 1], self.down[...])
        return y if self.down_bias is None else y + self.down_bias[...][None, None]


class Block(nnx.Module):
    """One transformer layer, with norms before or after attention and MLP, or both.

    `sparse` says that a mixture of experts takes the MLP's place: `mlp` or `experts` is None.
    """

    def __init__(
        self, config: DecoderConfig, rngs: nnx.Rngs, *, stack: Stack = (), dtype, sparse: bool
    ):
        norm = lambda: make_norm(config, config.hidden_size, stack=stack, dtype=dtype)
        before, after = config.norm_places != "after", config.norm_places != "before"
        self.attention_norm = norm() if before else None
        self.attention = Attention(config, rngs, stack=stack, dtype=dtype)
        self.attention_out_norm = norm() if after else None
        self.mlp_norm = norm() if before else None
        self.mlp = None if sparse else GatedMLP(config, rngs, stack=stack, dtype=dtype)
        self.experts = make_experts(config, rngs, stack=stack, dtype=dtype) if sparse else None
        self.mlp_out_norm = norm() if after else None

    def __call__(
        self,
        x: jax.Array,
        cache: KVCache,
        layer: Layer,
        angles: Angles,
        sink_angles: Angles | None,
        backend: Backend | None,
        *,
        place: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Adds attention, then the MLP, to the residual stream `[batch, tokens, hidden]`.

        `layer` and the other arguments are those of `Attention`. `place` is this layer's index
        among stacked experts; None if experts are not stacked.
        """
        y, cache = self.attention(
            normed(self.attention_norm, x), cache, layer, angles, sink_angles, backend
        )
        x = x + normed(self.attention_out_norm, y)
        y = normed(self.mlp_norm, x)
        if self.mlp is not None:
            y = self.mlp(y)
        elif self.experts is not None:
            y = self.experts(y, place)
        return x + normed(self.mlp_out_norm, y), cache


def normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    """`norm(x)`, or `x` where the architecture has no norm."""
    return x if norm is None else norm(x)


def make_experts(config: DecoderConfig, rngs: nnx.Rngs, *, stack: Stack, dtype) -> Experts:
    """The mixture of experts of a block."""
    assert config.experts is not None
    inner = config.expert_size or config.intermediate_size
    return Experts(config.experts, config.hidden_size, inner, rngs, stack=stack, dtype=dtype)
