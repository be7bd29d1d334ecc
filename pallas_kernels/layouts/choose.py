"""Chooses the page layout that a platform's kernels read."""

import functools

import jax.numpy as jnp

from pallas_kernels.codecs.codec import KVCodec
from pallas_kernels.layouts.packing import PARTS
from pallas_kernels.layouts.page_layout import PageLayout, is_float8
from pallas_kernels.layouts.token_major import TokenMajor
from pallas_kernels.layouts.tokens_last import TokensLast
from pallas_kernels.layouts.tokens_on_lanes import TokensOnLanes


def default_layout(
    codec: KVCodec, *, platform: str, kv_heads: int, head_dim: int, page_size: int
) -> PageLayout:
    """The layout of a lossy codec's pages for "cpu", "gpu" or "tpu".

    GPUs get 32-bit words where all integer codes have 4 bits, head_dim is at least 128, and the
    codes of a vector fill whole words; otherwise 16-bit words; bytes where neither fits.

    Raises:
      ValueError: unknown platform, or a shape that the layout cannot hold.
    """
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"{platform=} must be 'cpu', 'gpu' or 'tpu'.")
    kind = {"cpu": TokensLast, "tpu": TokensOnLanes}.get(platform)
    if kind is None:
        kind = functools.partial(TokenMajor, word_bits=_gpu_word_bits(codec, head_dim))
    layout = kind(codec=codec, head_dim=head_dim, page_size=page_size)
    layout.check_waste(kv_heads)
    return layout


def _gpu_word_bits(codec: KVCodec, head_dim: int) -> int:
    tensors = codec.key, codec.value
    integers = [t for t in tensors if t.codes_dtype in (jnp.uint8, jnp.int8)]
    packed = [t for t in tensors if t in integers or is_float8(t)]
    fits = lambda word_bits, packed: all(
        head_dim * width % word_bits == 0 for t in packed for width in PARTS[t.bits]
    )
    wide = head_dim >= 128 and integers and all(t.bits == 4 for t in integers)
    return 32 if wide and fits(32, integers) else 16 if fits(16, packed) else 8
