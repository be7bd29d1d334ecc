"""The NVIDIA backend: a Pallas kernel for the few query tokens of decode and verify.

Chunks of a prompt have no kernel here yet; `refusal` says what else it does not serve.
"""

import jax

from pallas_kernels.backends import interpreted
from pallas_kernels.paged_attention import gpu_decode
from pallas_kernels.pages import Pages

MOST_TOKENS = 8  # query tokens: one, or drafts to verify

# A function of its own: traced and lowered once for all layers of a model that are alike.
_attend = jax.jit(
    gpu_decode.paged_attention,
    static_argnames=("scale", "window", "sink_tokens", "lag", "soft_cap", "interpret", "config"),
)


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
    if q_tokens > MOST_TOKENS:
        return f"{q_tokens=}: the GPU kernel serves up to {MOST_TOKENS}"
    try:
        gpu_decode.check(pages, q_tokens=q_tokens, group=q_heads // pages.dims["kv_heads"])
    except NotImplementedError as error:
        return str(error).rstrip(".")
    return None


def paged_attention(q, pages, page_table, sink_table, **options) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`."""
    return _attend(q, pages, page_table, sink_table, interpret=interpreted(), **options)
