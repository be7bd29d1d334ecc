"""Chunks of a prompt on NVIDIA GPUs: blocks of query tokens, each its own sequence to the kernel.

A block has as many rows (query tokens times query heads per kv head) as fill a tile of the tensor
cores. It reads only the pages that its own tokens see, so causality, a window and a page lag save
work block by block, and a block of padding costs nothing.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.triton import call
from pallas_kernels.paged_attention.triton.tile_sizes import chunk_config
from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, Queries, Segment

MOST_BLOCKS = 2**16 - 1  # CUDA's bound on a grid's second axis


def block_tokens(group: int, head_dim: int) -> int:
    """Query tokens per block."""
    # Wide heads get half as many rows: their outputs would not fit into registers otherwise.
    rows = call.MOST_ROWS if head_dim <= 128 else call.MOST_ROWS // 2
    return max(1, rows // group)


def paged_attention(
    queries: Queries, pages: Pages, segment: Segment, *, rule: Rule, **options
) -> Part:
    """See `api.paged_attention`; `options` are passed on to `call.paged_attention`.

    Raises:
      NotImplementedError: more blocks than one launch takes.
    """
    batch, q_tokens, q_heads, head_dim = queries.q.shape
    size = min(q_tokens, block_tokens(q_heads // pages.dims["kv_heads"], head_dim))
    blocks = -(-q_tokens // size)
    if batch * blocks > MOST_BLOCKS:
        raise NotImplementedError(
            f"{batch=}, {q_tokens=}: {batch * blocks} blocks of {size} query tokens, and the GPU "
            f"kernel serves up to {MOST_BLOCKS}; take fewer tokens per chunk."
        )
    repeat = lambda x: jnp.repeat(x, blocks, axis=0)
    first = jnp.tile(jnp.arange(blocks, dtype=jnp.int32) * size, batch)
    q = jnp.pad(queries.q, ((0, 0), (0, blocks * size - q_tokens), (0, 0), (0, 0)))
    blocks_of_queries = Queries(
        q=q.reshape(batch * blocks, size, q_heads, head_dim),
        start=repeat(queries.start) + first,
        lens=jnp.clip(repeat(queries.lens) - first, 0, size),
    )
    out, lse = call.paged_attention(
        blocks_of_queries,
        pages,
        jax.tree.map(repeat, segment),
        rule=rule,
        config=chunk_config(pages),
        **options,
    )
    out = out.reshape(batch, blocks * size, q_heads, head_dim)
    lse = lse.reshape(batch, blocks * size, q_heads)
    return Part(out[:, :q_tokens], lse[:, :q_tokens])
