"""Segments of a KV cache, attention over one of them as a part, and how parts merge.

A sequence's cache is a short list of segments: runs of pages, each in one store. Attention over a
union of key sets is the average of the parts, weighted by `exp(lse)` (FlashAttention's split-KV,
arXiv:2205.14135). A learned sink logit (gpt-oss) is one more part, whose value is zero, so it is
merged once, at the end.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_floats, check_types
from pallas_kernels.rule import Rule
from pallas_kernels.x32 import in_32_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """The newest tokens of each sequence."""

    q: jax.Array  # [batch, q_tokens, q_heads, head_dim], any float dtype
    start: jax.Array  # i32[batch], position of the first query token
    lens: jax.Array  # i32[batch], real query tokens; later rows are padding and see nothing

    @property
    def positions(self) -> jax.Array:
        """Position of each query token, `i32[batch, q_tokens]`; -1 for padding."""
        row = jnp.arange(self.q.shape[1], dtype=jnp.int32)[None]
        return jnp.where(row < self.lens[:, None], self.start[:, None] + row, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of pages of each sequence, and pinned sink pages that are read in the same call.

    The run holds entries `start <= g < stop` (tokens, where a rule has no stride). `table` is a
    ring: the id of logical page `p` is in slot `p % width`, and the run has at most `width` pages.
    Slots of pages outside the run are not read. `sinks` holds the ids of logical pages 0 to
    `sink_pages - 1` of the same pools, which hold entries up to `stop`. The run begins after them,
    and a lag does not apply to them.
    """

    table: jax.Array  # i32[batch, width]
    start: jax.Array  # i32[batch]
    stop: jax.Array  # i32[batch]
    sinks: jax.Array | None = None  # i32[batch, sink_pages]


class Span(NamedTuple):
    """Entries `start <= g < stop`."""

    start: jax.Array  # i32[batch]
    stop: jax.Array  # i32[batch]


class Spans(NamedTuple):
    """The entries of a segment that some query can see."""

    run: Span
    sinks: Span | None  # None for a segment without sink pages


def seen_spans(queries: Queries, segment: Segment, rule: Rule, page_size: int) -> Spans:
    """Narrows a segment to the entries that some query can see."""
    sinks, run_rule = None, rule
    if segment.sinks is not None:
        # Sink pages are a separate span, so the run is read only from the window on.
        run_rule = dataclasses.replace(rule, sink_tokens=0)
        sink_rule = dataclasses.replace(rule, lag=None)
        stop = jnp.minimum(segment.stop, segment.sinks.shape[1] * page_size)
        start = jnp.zeros_like(stop)
        sinks = Span(*sink_rule.seen_by_some(queries.start, queries.lens, start, stop))
    run = run_rule.seen_by_some(queries.start, queries.lens, segment.start, segment.stop)
    return Spans(Span(*run), sinks)


# A finite running maximum for rows that have seen nothing, so that no -inf - -inf appears.
NOTHING_SEEN = -1e30


class Part(NamedTuple):
    """Attention over a set of keys, ready to be merged with others."""

    out: jax.Array  # [batch, q_tokens, q_heads, head_dim], 0 where the set was empty
    lse: jax.Array  # f32[batch, q_tokens, q_heads], natural log, -inf where the set was empty


@in_32_bits
def merge(a: Part, b: Part) -> Part:
    """Attention over two disjoint key sets from attention over each, in float32.

    Raises:
      ValueError: the parts differ in shape.
    """
    check_types(a=(a, Part), b=(b, Part))
    shape = a.out.shape
    for name, x, rule in (
        ("a.lse", a.lse, shape[:-1]), ("b.out", b.out, shape), ("b.lse", b.lse, shape[:-1])
    ):  # fmt: skip
        if x.shape != rule:
            raise ValueError(f"{name}.shape={x.shape} must be {rule}.")
    top = jnp.maximum(a.lse, b.lse)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # -inf - -inf is NaN
    weight_a, weight_b = jnp.exp(a.lse - top), jnp.exp(b.lse - top)
    total = weight_a + weight_b
    seen = total != 0  # a NaN in either part stays one
    total = jnp.where(seen, total, 1.0)
    out_a, out_b = a.out.astype(jnp.float32), b.out.astype(jnp.float32)
    out = out_a * (weight_a / total)[..., None] + out_b * (weight_b / total)[..., None]
    return Part(out, jnp.where(seen, top + jnp.log(total), -jnp.inf))


@in_32_bits
def add_learned_sink(part: Part, sink_logits: jax.Array) -> Part:
    """Adds `exp(sink_logits)` to the softmax denominator and nothing to the numerator (gpt-oss).

    Args:
      part: attention over all keys, `f32`.
      sink_logits: `[q_heads]`, `-inf` for none; not multiplied by the attention scale.

    Raises:
      ValueError: not one logit, a float, per query head.
    """
    if sink_logits.shape != part.lse.shape[-1:]:
        raise ValueError(f"sink_logits.shape={sink_logits.shape} must be {part.lse.shape[-1:]}.")
    check_floats(sink_logits=sink_logits)
    sink = sink_logits.astype(jnp.float32).reshape((1,) * (part.lse.ndim - 1) + sink_logits.shape)
    sink = jnp.broadcast_to(sink, part.lse.shape)
    return merge(part, Part(jnp.zeros_like(part.out), sink))
