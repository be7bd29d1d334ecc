"""The arrays that the attention kernel reads and writes; inside the kernel they are refs."""

import dataclasses

import jax

from pallas_kernels.paged_attention.triton.span import Bounds
from pallas_kernels.paged_attention.triton.work_list import WorkList
from pallas_kernels.shapes import Operand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arrays that the kernel reads; None where a call needs no such array."""

    bounds: Bounds
    layer: Operand  # i32[1]
    q_lens: Operand  # i32[batch], real query tokens
    table: Operand  # i32[batch, sink_pages + width]
    work: WorkList | None = None  # None for one program per sequence
    bias: Operand | None = None  # f32[batch, kv_heads, sink_pages + width, rows], see `means`
    q: Operand  # [batch, q_tokens, q_heads, head_dim], dims in the key reader's order
    pools: dict[str, Operand]  # named as in the layout, each [layers, pages, ...]
    k_shifts: Operand | None = None  # i32[tiles, parts, columns], see `PlanesReader.shifts`
    v_shifts: Operand | None = None  # like k_shifts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Arrays that the kernel writes; dims of outputs are in the value reader's order."""

    # Results of sequences that one program attended whole.
    out: Operand  # [batch, q_tokens, q_heads, head_dim]
    lse: Operand  # f32[batch, q_tokens, q_heads], natural
    # Parts of the other sequences, to be merged; None where no sequence is cut.
    part: Operand | None = None  # f32[parts, kv_heads, rows, head_dim]
    part_lse: Operand | None = None  # f32[parts, kv_heads, rows], base 2
