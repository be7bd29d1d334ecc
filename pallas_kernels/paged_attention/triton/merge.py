"""The merge of a sequence's parts by their log-sum-exp, in place."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.triton.base2 import LN2
from pallas_kernels.segment import NOTHING_SEEN

# Least and most parts that are merged in one step. The step is sized by the mean number of parts
# per sequence, but not below 8, because one long sequence among short ones has many parts.
PARTS_AT_ONCE = 8, 64


def _combine_kernel(
    part_ref,  # f32[parts, kv_heads, rows, head_dim]
    lse_ref,  # f32[parts, kv_heads, rows], base 2
    first_ref,  # i32[batch], number of a sequence's first part
    count_ref,  # i32[batch], how many parts it has
    _old_out_ref,  # same memory as out; sequences of one part have their result there
    _old_out_lse_ref,  # same memory as out_lse
    out_ref,  # [batch, q_tokens, q_heads, head_dim]
    out_lse_ref,  # f32[batch, q_tokens, q_heads], natural
    *,
    group: int,
    columns: int,
    block: int,
):
    b, t, head = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    head_dim = out_ref.shape[3]
    h, row = head // group, t * group + head % group
    first, count = first_ref[b], count_ref[b]
    column = jnp.arange(columns, dtype=jnp.int32)
    inside = column < head_dim

    def merge(i, state):
        m, l, acc = state
        rank = i * block + jnp.arange(block, dtype=jnp.int32)
        used = rank < count
        at = first + jnp.where(used, rank, 0)
        lse = plgpu.load(lse_ref.at[at, h, row], mask=used, other=NOTHING_SEEN)
        part = plgpu.load(
            part_ref.at[
                jnp.broadcast_to(at[:, None], (block, columns)),
                h,
                row,
                jnp.broadcast_to(column[None], (block, columns)),
            ],
            mask=used[:, None] & inside[None],
            other=0.0,
        )
        m_new = jnp.maximum(m, jnp.max(lse))
        weight = jnp.where(lse != NOTHING_SEEN, jnp.exp2(lse - m_new), 0.0)
        shrink = jnp.exp2(m - m_new)
        return (
            m_new,
            l * shrink + jnp.sum(weight),
            acc * shrink + jnp.sum(part * weight[:, None], axis=0),
        )

    @pl.when(count != 1)
    def _():
        init = (jnp.float32(NOTHING_SEEN), jnp.float32(0), jnp.zeros((columns,), jnp.float32))
        m, l, acc = jax.lax.fori_loop(0, pl.cdiv(count, block), merge, init)
        seen = l != 0  # a part that is NaN makes its sequence NaN
        total = jnp.where(seen, l, 1.0)
        out = (acc * (1.0 / total)).astype(out_ref.dtype)
        plgpu.store(out_ref.at[b, t, head, column], out, mask=inside)
        out_lse_ref[b, t, head] = jnp.where(seen, (m + jnp.log2(total)) * LN2, -jnp.inf)


def combine(
    part: jax.Array,
    part_lse: jax.Array,
    first_part: jax.Array,
    part_count: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Merges each sequence's parts by their log-sum-exp and writes the results into `out`, `lse`.

    Args:
      part: `f32[parts, kv_heads, rows, head_dim]`; row `t * group + g` is query token `t`.
      part_lse: `f32[parts, kv_heads, rows]`, base 2, `NOTHING_SEEN` for a row that saw nothing.
      first_part: `i32[batch]`, number of each sequence's first part.
      part_count: `i32[batch]`, number of its parts; 0 gives an output of 0.
      out: `[batch, q_tokens, q_heads, head_dim]`; holds the results of sequences of one part.
      lse: `f32[batch, q_tokens, q_heads]`, natural log; likewise.
      interpret: run on the CPU.

    Returns:
      `out` and `lse` of all sequences.
    """
    batch, q_tokens, q_heads, head_dim = out.shape
    least, most = PARTS_AT_ONCE
    block = min(most, max(least, pl.next_power_of_2(pl.cdiv(part.shape[0], batch))))
    return pl.pallas_call(
        functools.partial(
            _combine_kernel,
            group=q_heads // part.shape[1],
            columns=pl.next_power_of_2(head_dim),
            block=block,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (out, lse)],
        grid=(q_heads, q_tokens, batch),
        input_output_aliases={4: 0, 5: 1},
        compiler_params=plgpu.CompilerParams(num_warps=1 if block <= 16 else 4, num_stages=2),
        interpret=interpret,
        name="paged_attention_combine",
    )(part, part_lse, first_part, part_count, out, lse)
