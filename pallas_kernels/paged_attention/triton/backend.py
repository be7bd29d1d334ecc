"""Which calls the Triton kernels serve, and whether a call has a few query tokens or is a chunk."""

import jax
import jax.numpy as jnp

from pallas_kernels.backends import interpreted
from pallas_kernels.layouts.plain import Plain
from pallas_kernels.paged_attention.triton import call, chunks
from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, Queries, Segment

MOST_TOKENS = 8  # most query tokens of decode and verify; more are a chunk
STATIC = ("rule", "scale", "soft_cap", "out_dtype", "interpret")

# Jitted here, so that they are traced and lowered once for all layers of a model that are alike.
_attend_few = jax.jit(call.paged_attention, static_argnames=STATIC)
_attend_chunk = jax.jit(chunks.paged_attention, static_argnames=STATIC)


def is_chunk(pages: Pages, *, q_tokens: int, q_heads: int) -> bool:
    """Whether a call's query tokens are cut into blocks, because there are too many of them."""
    rows = q_tokens * (q_heads // pages.dims["kv_heads"])
    return q_tokens > MOST_TOKENS or rows > call.MOST_ROWS


def refusal(pages: Pages, *, q_tokens: int, q_heads: int) -> str | None:
    """Why this backend does not serve a call, in words; None if it does.

    Args:
      pages: the op's pages; shapes and dtypes are enough.
      q_tokens: query tokens per sequence.
      q_heads: query heads.
    """
    chunk = is_chunk(pages, q_tokens=q_tokens, q_heads=q_heads)
    is_plain = isinstance(pages.layout, Plain)
    if chunk and is_plain and pages.arrays["k"].dtype == jnp.float32:
        # A chunk's float32 tiles need more shared memory than there is, and no matrix unit helps.
        return f"float32 pages, {q_tokens=}: the GPU kernel serves up to {MOST_TOKENS} of them"
    group = q_heads // pages.dims["kv_heads"]
    return call.refusal(pages, q_tokens=1 if chunk else q_tokens, group=group)


def paged_attention(
    queries: Queries, pages: Pages, segment: Segment, rule: Rule, **options
) -> Part:
    """See `api.paged_attention`."""
    chunk = is_chunk(pages, q_tokens=queries.q.shape[1], q_heads=queries.q.shape[2])
    attend = _attend_chunk if chunk else _attend_few
    return attend(queries, pages, segment, rule=rule, interpret=interpreted(), **options)
