"""Chunks of a prompt on NVIDIA GPUs: blocks of query tokens, each a sequence to the kernel.

A block has as many rows (query tokens times the heads of a kv head) as fill a tile of the tensor
cores. What it reads is narrowed to what its own tokens see, so causality, a window and a page lag
save work block by block, and a block of padding costs nothing.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import gpu_decode
from pallas_kernels.paged_attention.gpu_tiles import chunk_config
from pallas_kernels.pages import Pages
from pallas_kernels.visibility import PageLag, seen_span

MOST_BLOCKS = 2**16 - 1  # CUDA's bound on a grid's second axis


def block_tokens(group: int, head_dim: int) -> int:
    """Query tokens of a block."""
    # Outputs of wide heads would not fit into registers otherwise.
    rows = gpu_decode.MOST_ROWS if head_dim <= 128 else gpu_decode.MOST_ROWS // 2
    return max(1, rows // group)


def paged_attention(
    q: jax.Array,
    pages: Pages,
    page_table: jax.Array,
    sink_table: jax.Array | None = None,
    *,
    q_start: jax.Array,
    q_lens: jax.Array,
    kv_start: jax.Array,
    kv_stop: jax.Array,
    sink_span: tuple[jax.Array, jax.Array] | None = None,
    window: int | None,
    sink_tokens: int,
    lag: PageLag | None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`; `options` are the kernel's, which takes them as they are."""
    batch, q_tokens, q_heads, head_dim = q.shape
    size = min(q_tokens, block_tokens(q_heads // pages.dims["kv_heads"], head_dim))
    blocks = -(-q_tokens // size)
    if batch * blocks > MOST_BLOCKS:
        raise NotImplementedError(
            f"{batch=}, {q_tokens=}: {batch * blocks} blocks of {size} query tokens, and the GPU "
            f"kernel serves up to {MOST_BLOCKS}; take fewer tokens a chunk."
        )
    repeat = lambda x: jnp.repeat(x, blocks, axis=0)
    first = jnp.tile(jnp.arange(blocks, dtype=jnp.int32) * size, batch)
    start = repeat(q_start) + first
    lens = jnp.clip(repeat(q_lens) - first, 0, size)
    ring_sinks = sink_tokens if sink_table is None else 0
    span = seen_span(
        start,
        lens,
        repeat(kv_start),
        repeat(kv_stop),
        window=window,
        sink_tokens=ring_sinks,
        lag=lag,
    )
    if sink_span is not None:
        sink_span = seen_span(
            start, lens, *map(repeat, sink_span), window=window, sink_tokens=sink_tokens
        )
    q = jnp.pad(q, ((0, 0), (0, blocks * size - q_tokens), (0, 0), (0, 0)))
    out, lse = gpu_decode.paged_attention(
        q.reshape(batch * blocks, size, q_heads, head_dim),
        pages,
        repeat(page_table),
        None if sink_table is None else repeat(sink_table),
        q_start=start,
        q_lens=lens,
        kv_start=span[0],
        kv_stop=span[1],
        sink_span=sink_span,
        window=window,
        sink_tokens=sink_tokens,
        lag=lag,
        config=chunk_config(pages),
        **options,
    )
    out = out.reshape(batch, blocks * size, q_heads, head_dim)
    lse = lse.reshape(batch, blocks * size, q_heads)
    return out[:, :q_tokens], lse[:, :q_tokens]
