"""A mixture of experts: a router, and experts.

Experts that no token was sent to are not read. Tokens are grouped by expert, so that a weight is
read once for a block of tokens. Weights may stay packed as MXFP4 in memory.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from models import mxfp4
from pallas_kernels.device import current_platform

Layer = int | jax.Array

# A CPU reads this many rows of a weight at a time: 512 x 2880 values fit in its last-level cache.
CPU_TILE = 512
# Reading and unpacking an expert takes as long as multiplying it by this many tokens. The number
# for CPUs was measured on two AVX-512 cores; the one for GPUs follows from an H100's bandwidth and
# its rate of bfloat16 products.
UNPACK_TOKENS = {"cpu": 16, "gpu": 400}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Static description of an `Experts` layer.

    Attributes:
      experts: number of experts.
      top_k: number of experts that a token is sent to.
      alpha: slope of the sigmoid in the activation; 1 is SiLU.
      limit: bound on gate and up before the activation; None for no bound.
      up_offset: added to up before it is multiplied.
      biases: router and experts have biases.
      shares: what weighs the outputs of a token's experts: "chosen", the softmax of their logits,
        which sums to 1, or "all", their parts of the softmax over all experts' logits.
      packed: weights are MXFP4 blocks in memory and are dequantized when they are used.
    """

    experts: int
    top_k: int
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    biases: bool = False
    shares: Literal["chosen", "all"] = "chosen"
    packed: bool = False

    def __post_init__(self):
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must be 1 to experts={self.experts}.")


class ExpertParam(nnx.Param):
    """A weight of all experts, of which a call reads only those of a few experts.

    A scan over layers must not slice it, because the slice for a layer would copy all its experts.
    Split these parameters off by type, pass them whole, and say which layer is meant.
    """


class Experts(nnx.Module):
    """Router and experts of Mixtral (arXiv:2401.04088), Qwen3 and gpt-oss (arXiv:2508.10925).

    A token goes to the `top_k` experts with the largest router logits. A softmax of the logits
    weighs the experts' outputs, `down(gate * sigmoid(alpha * gate) * (up + up_offset))`, with
    `gate` clipped to at most `limit` and `up` to `-limit` .. `limit`. Router logits are float32.

    All parameters have the leading axes `stack`. Gate and up are interleaved, as gpt-oss publishes
    them: even columns are gate, odd ones up. Biases are None where the config has none.
      router: `[hidden, experts]`, `router_bias`: `[experts]`;
      gate_up_bias: `[experts, 2 * inner]`, `down_bias`: `[experts, hidden]`;
      not packed: `gate_up`: `[experts, hidden, 2 * inner]`, `down`: `[experts, inner, hidden]`;
      packed: `gate_up_blocks`: `u8[experts, 2 * inner, hidden / 32, 16]`, `gate_up_scales`:
      `u8[experts, 2 * inner, hidden / 32]`, `down_blocks`: `u8[experts, hidden, inner / 32, 16]`,
      `down_scales`: `u8[experts, hidden, inner / 32]`.

    To scan over layers, build it with `stack=(layers,)`, keep it out of the scanned arrays and call
    it with the layer's index. Every parameter is an `ExpertParam`:

        graph, experts, others = nnx.split(blocks, ExpertParam, ...)
        # in the body, with others_i the slice of the others for layer i:
        nnx.merge(graph, experts, others_i).experts(x, i)

    Args:
      config: sizes and activation.
      hidden: size of a token.
      inner: size inside an expert.
      rngs: for random weights.
      stack: `()`, or `(layers,)` to hold the weights of several layers.
      dtype: of the weights that are not packed. On CPUs avoid plain bfloat16 experts: JAX 0.10's
        compiler copies all of them to float32 in every call. It reads float32 and packed experts
        in place.

    Raises:
      ValueError: experts are packed, and a size is not a multiple of 32.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        hidden: int,
        inner: int,
        rngs: nnx.Rngs,
        *,
        stack: tuple[int, ...] = (),
        dtype,
    ):
        if config.packed and (hidden % mxfp4.BLOCK or inner % mxfp4.BLOCK):
            raise ValueError(f"{hidden=} and {inner=} must be multiples of {mxfp4.BLOCK}.")
        if len(stack) > 1:
            raise ValueError(f"{stack=} must have at most one axis.")
        self.config, self.stacked = config, bool(stack)
        each = (*stack, config.experts)

        def normal(*shape: int, fan_in: int) -> ExpertParam:
            scale = jnp.asarray(fan_in**-0.5, dtype)
            return ExpertParam(jax.random.normal(rngs.params(), shape, dtype) * scale)

        def random_bytes(*shape: int) -> ExpertParam:
            return ExpertParam(jax.random.bits(rngs.params(), shape, jnp.uint8))

        def scales(*shape: int, fan_in: int) -> ExpertParam:
            # The root mean square of random codes is 3.
            exponent = 127 - round(math.log2(3 * fan_in**0.5))
            return ExpertParam(jnp.full(shape, exponent, jnp.uint8))

        self.router = normal(*stack, hidden, config.experts, fan_in=hidden)
        zeros = lambda *shape: ExpertParam(jnp.zeros(shape, dtype)) if config.biases else None
        self.router_bias = zeros(*each)
        self.gate_up_bias = zeros(*each, 2 * inner)
        self.down_bias = zeros(*each, hidden)
        if config.packed:
            into, out_of = hidden // mxfp4.BLOCK, inner // mxfp4.BLOCK
            self.gate_up_blocks = random_bytes(*each, 2 * inner, into, mxfp4.BLOCK_BYTES)
            self.gate_up_scales = scales(*each, 2 * inner, into, fan_in=hidden)
            self.down_blocks = random_bytes(*each, hidden, out_of, mxfp4.BLOCK_BYTES)
            self.down_scales = scales(*each, hidden, out_of, fan_in=inner)
        else:
            self.gate_up = normal(*each, hidden, 2 * inner, fan_in=hidden)
            self.down = normal(*each, inner, hidden, fan_in=inner)

    def __call__(self, x: jax.Array, layer: Layer | None = None) -> jax.Array:
        """Maps `[batch, tokens, hidden]` to the same shape; tokens do not affect each other.

        Args:
          x: the tokens.
          layer: index of the layer among the stacked ones; None if weights are not stacked.
        """
        if self.stacked != (layer is not None):
            raise ValueError(f"{layer=} must be given for stacked weights and for no others.")
        layer = 0 if layer is None else layer
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = self._route(tokens, layer)
        groups = group_by_expert(experts, self.config.experts)
        out = self._run(tokens, groups, layer)[groups.place]  # [tokens, top_k, hidden]
        out = jnp.einsum("tk,tkd->td", weights, out, preferred_element_type=jnp.float32)
        return out.astype(x.dtype).reshape(x.shape)

    def _route(self, tokens: jax.Array, layer: Layer) -> tuple[jax.Array, jax.Array]:
        """Each token's experts, `i32[tokens, top_k]`, and their weights, `f32[tokens, top_k]`."""
        part = lambda parameter: self._layer(parameter, layer).astype(jnp.float32)
        logits = tokens.astype(jnp.float32) @ part(self.router)
        if self.router_bias is not None:
            logits = logits + part(self.router_bias)[None]
        chosen, experts = jax.lax.top_k(logits, self.config.top_k)
        if self.config.shares == "chosen":
            return experts, jax.nn.softmax(chosen, axis=-1)
        return experts, jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    def _run(self, tokens: jax.Array, groups: "Groups", layer: Layer) -> jax.Array:
        """Outputs of token-expert pairs in grouped order, `[pairs + block - 1, hidden]`."""

        def run_block(b, out):
            expert, start = groups.find(b)
            x = tokens[jax.lax.dynamic_slice(groups.token, _at(start), (groups.block,))]
            y = self._expert(x.T, layer * self.config.experts + expert).T.astype(out.dtype)
            # Rows that a block writes past its expert's are garbage; the next one overwrites them.
            return jax.lax.dynamic_update_slice(out, y, _at(start, 0))

        out = jnp.zeros((groups.token.size, tokens.shape[1]), tokens.dtype)
        return jax.lax.fori_loop(0, groups.blocks, run_block, out)

    def _expert(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Applies one expert to a block of tokens, `[hidden, block]`."""
        y = self._project("gate_up", x, index)
        gate, up, limit = y[0::2], y[1::2], self.config.limit
        if limit is not None:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        y = gate * jax.nn.sigmoid(self.config.alpha * gate) * (up + self.config.up_offset)
        return self._project("down", y.astype(x.dtype), index)

    def _project(self, name: str, x: jax.Array, index: jax.Array) -> jax.Array:
        """`weight.T @ x + bias` of one expert, `[in, block]` to `f32[out, block]`."""
        if current_platform() == "cpu":
            x = x.astype(jnp.float32)  # products of bfloat16 are slower, or missing
        multiply = self._multiply_packed if self.config.packed else self._multiply_plain
        y = multiply(name, x, index)
        if not self.config.biases:
            return y
        return y + self._flat(name + "_bias")[index].astype(jnp.float32)[:, None]

    def _multiply_packed(self, name: str, x: jax.Array, index: jax.Array) -> jax.Array:
        """The product with a packed weight, `f32[out, block]`.

        It goes by tiles of outputs, because they are the rows of the packed layout.
        """
        blocks, scales = self._flat(name + "_blocks"), self._flat(name + "_scales")
        size = scales.shape[1]
        tile, tiles = _tiles(size)

        def write_tile(t, y):
            start = jnp.minimum(t * tile, size - tile)  # the last tile overlaps the one before
            part = mxfp4.multiply(
                _expert_rows(blocks, index, start, tile),
                _expert_rows(scales, index, start, tile),
                x,
            )
            return jax.lax.dynamic_update_slice(y, part, _at(start, 0))

        y = jnp.zeros((size, x.shape[1]), jnp.float32)
        return jax.lax.fori_loop(0, tiles, write_tile, y)

    def _multiply_plain(self, name: str, x: jax.Array, index: jax.Array) -> jax.Array:
        """The product with a plain weight, `f32[out, block]`.

        It goes by tiles of inputs, because they are the rows of the plain layout.
        """
        tile, tiles = _tiles(x.shape[0])
        weight, rows = self._flat(name), x.T

        def add_tile(t, y):
            start = jnp.minimum(t * tile, x.shape[0] - tile)
            new = start + jnp.arange(tile) >= t * tile  # the last tile overlaps the one before
            part = jax.lax.dynamic_slice(rows, _at(0, start), (rows.shape[0], tile))
            part = jnp.where(new[None], part, 0)
            w = _expert_rows(weight, index, start, tile)
            return y + jnp.dot(part, w.astype(x.dtype), preferred_element_type=jnp.float32)

        y = jnp.zeros((x.shape[1], weight.shape[-1]), jnp.float32)
        return jax.lax.fori_loop(0, tiles, add_tile, y).T

    def _layer(self, parameter: nnx.Param, layer: Layer) -> jax.Array:
        """A layer's slice of a small parameter."""
        return parameter[...][layer] if self.stacked else parameter[...]

    def _flat(self, name: str) -> jax.Array:
        """A weight with the experts of all layers on one axis, so that a slice reads just one."""
        value = getattr(self, name)[...]
        return value.reshape(-1, *value.shape[2:]) if self.stacked else value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Token-expert pairs ordered by expert, and cut into blocks that have one expert each."""

    token: jax.Array  # i32[pairs + block - 1], each pair's token in this order, then padding
    place: jax.Array  # i32[tokens, top_k], the index of each token's pairs in this order
    first_pair: jax.Array  # i32[experts], index of an expert's first pair
    last_block: jax.Array  # i32[experts], the block after an expert's last
    first_block: jax.Array  # i32[experts], an expert's first block
    block: int = dataclasses.field(metadata=dict(static=True))  # number of pairs in a block

    @property
    def blocks(self) -> jax.Array:
        """Number of blocks in use. Only the experts of these blocks are read."""
        return self.last_block[-1]

    def find(self, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Block b's expert and the index of the block's first pair."""
        expert = jnp.sum(self.last_block <= b)
        return expert, self.first_pair[expert] + (b - self.first_block[expert]) * self.block


def group_by_expert(experts: jax.Array, count: int) -> Groups:
    """Groups the pairs of `experts`, `i32[tokens, top_k]`, numbers below `count`."""
    pairs, top_k = experts.size, experts.shape[1]
    block = block_size(experts.shape[0], pairs / count)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    sizes = jnp.sum(flat[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)
    blocks = (sizes + block - 1) // block
    last_block = jnp.cumsum(blocks, dtype=jnp.int32)
    return Groups(
        token=jnp.pad(order // top_k, (0, block - 1)),
        place=place.reshape(experts.shape),
        first_pair=jnp.cumsum(sizes, dtype=jnp.int32) - sizes,
        last_block=last_block,
        first_block=last_block - blocks,
        block=block,
    )


def _at(*places: int | jax.Array) -> tuple[jax.Array, ...]:
    """Places of a slice, of one type: loops count in 64 bits where JAX has them enabled."""
    return tuple(jnp.asarray(place, jnp.int32) for place in places)


def _expert_rows(weight: jax.Array, index: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`weight[index, start : start + size]`."""
    places = _at(index, start, *(0,) * (weight.ndim - 2))
    return jax.lax.dynamic_slice(weight, places, (1, size, *weight.shape[2:]))[0]


def _tiles(size: int) -> tuple[int, int]:
    """Rows of a weight per tile, and the number of tiles; except on a CPU one tile has all rows."""
    tile = min(size, CPU_TILE) if current_platform() == "cpu" else size
    return tile, -(-size // tile)


def block_size(tokens: int, per_expert: float) -> int:
    """The best number of pairs in a block, a power of two.

    An expert with c pairs has about c / block + 1 / 2 blocks. Each block costs an unpacking and a
    product, in total `(c / block + 1 / 2) * (unpack + block)`, where `unpack` is the cost of an
    unpacking in tokens. This is least for `block = sqrt(2 * c * unpack)`. An expert has at most one
    pair per token, so a block never needs more pairs than there are tokens.

    Args:
      tokens: number of tokens.
      per_expert: the mean number of pairs per expert.
    """
    best = math.sqrt(
        2 * per_expert * UNPACK_TOKENS["cpu" if current_platform() == "cpu" else "gpu"]
    )
    return 1 << math.ceil(math.log2(max(1, min(best, tokens))))
