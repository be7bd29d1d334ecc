"""The NVIDIA backend: one Pallas kernel for decode, verify and, block by block, chunks of prompts.

`refusal` says what it does not serve.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.backends import interpreted
from pallas_kernels.paged_attention import gpu_chunks, gpu_decode
from pallas_kernels.pages import ExactPages, Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, Queries, Segment

MOST_TOKENS = 8  # query tokens of decode and verify; what is longer is a chunk
STATIC = ("rule", "scale", "soft_cap", "out_dtype", "interpret")

# Functions of their own: traced and lowered once for all layers of a model that are alike.
_attend_few = jax.jit(gpu_decode.paged_attention, static_argnames=STATIC)
_attend_chunk = jax.jit(gpu_chunks.paged_attention, static_argnames=STATIC)


def is_chunk(pages: Pages, *, q_tokens: int, q_heads: int) -> bool:
    """Whether query tokens are cut into blocks: they are many, or too many for one program."""
    rows = q_tokens * (q_heads // pages.dims["kv_heads"])
    return q_tokens > MOST_TOKENS or rows > gpu_decode.MOST_ROWS


def refusal(
    pages: Pages, *, q_tokens: int, q_heads: int, platform: str | None = None
) -> str | None:
    """Why this backend does not serve a call, in words; None if it does.

    Args:
      pages: as the op takes them; shapes and dtypes are enough.
      q_tokens: query tokens a sequence.
      q_heads: query heads.
      platform: "cpu", "gpu" or "tpu"; None asks JAX.
    """
    platform = platform or jax.default_backend()
    if platform != "gpu" and not interpreted():
        return f"backend='gpu' needs an NVIDIA GPU, and JAX runs on {platform!r}"
    chunk = is_chunk(pages, q_tokens=q_tokens, q_heads=q_heads)
    if chunk and isinstance(pages, ExactPages) and pages.k.dtype == jnp.float32:
        # Tiles of so many rows need more shared memory than there is, and no matrix unit helps.
        return f"float32 pages, {q_tokens=}: the GPU kernel serves up to {MOST_TOKENS} of them"
    group = q_heads // pages.dims["kv_heads"]
    try:
        gpu_decode.check(pages, q_tokens=1 if chunk else q_tokens, group=group)
    except NotImplementedError as error:
        return str(error).rstrip(".")
    return None


def paged_attention(
    queries: Queries, pages: Pages, segment: Segment, rule: Rule, **options
) -> Part:
    """See `api.paged_attention`."""
    chunk = is_chunk(pages, q_tokens=queries.q.shape[1], q_heads=queries.q.shape[2])
    attend = _attend_chunk if chunk else _attend_few
    return attend(queries, pages, segment, rule=rule, interpret=interpreted(), **options)
