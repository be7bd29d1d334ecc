"""The attention kernel: a program attends its share of the pages, sequence by sequence."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.triton.base2 import LN2
from pallas_kernels.paged_attention.triton.blocks import Item
from pallas_kernels.paged_attention.triton.case import Case
from pallas_kernels.paged_attention.triton.operands import Inputs, Outputs
from pallas_kernels.paged_attention.triton.softmax import (
    ItemAttention,
    State,
    columns,
    item_attention,
)
from pallas_kernels.paged_attention.triton.tile_sizes import DecodeConfig
from pallas_kernels.segment import NOTHING_SEEN


def decode_kernel(refs: Inputs, outputs: Outputs, *, case: Case, config: DecodeConfig):
    """One program: attends one sequence or, with a work list, its stretch of all sequences' pages.

    The grid is (kv_heads, programs).
    """
    h, program = pl.program_id(0), pl.program_id(1)
    attend = functools.partial(_attend, refs, outputs, h, case=case, config=config)
    work = refs.work
    if work is None:
        span = case.find_span(refs.bounds.of(program))
        attend(Item(program, jnp.int32(0), span.pages, span, None))
        return
    low, high = work.low[program], work.high[program]

    def step(k, _):
        b, before = work.sequence[k], work.before[k]
        span = case.find_span(refs.bounds.of(b))
        start = jnp.maximum(low - before, 0)
        stop = jnp.minimum(high - before, span.pages)
        attend(Item(b, start, stop, span, program + k))

    jax.lax.fori_loop(work.first[program], work.stop[program], step, None)


def _attend(refs: Inputs, outputs: Outputs, h, item: Item, *, case: Case, config: DecodeConfig):
    """Attends an item's pages and stores the result of kv head `h`'s rows."""
    attention = item_attention(refs, h, item, case=case, config=config)
    _store(outputs, h, item, attention, attention.run())


def _store(outputs: Outputs, h, item: Item, attention: ItemAttention, state: State):
    """Stores outputs and log-sum-exps of an item's rows.

    If the item is its sequence's only part, they are the result; otherwise, a part to be merged.
    """
    case, axes, rows = attention.case, attention.axes, attention.rows
    m, l = state.m - attention.offset, axes.total(state.l)
    zero_sum = axes.total(state.zero_sum)
    # `l` is NaN where a row sees a key that is: its result must not look like that of an empty row.
    seen = (l != 0) & (attention.row_token < attention.q_len)
    total = jnp.where(seen, l, 1.0)
    norm = jnp.where(seen, 1.0 / total, 0.0)
    row = jnp.arange(rows, dtype=jnp.int32)
    # Padding rows are masked and also out of bounds: the interpreter writes to masked places, too.
    real = row < case.rows
    lse = jnp.where(seen, m + jnp.log2(total), NOTHING_SEEN)
    natural = jnp.where(seen, lse * LN2, -jnp.inf)
    at = (item.b, row // case.group, row % case.group + h * case.group)
    targets = [(outputs.out, outputs.lse, at, natural, real)]
    work = attention.refs.work
    if item.part is not None and work is not None:
        whole = work.part_count[item.b] == 1
        targets = [
            (outputs.out, outputs.lse, at, natural, real & whole),
            (outputs.part, outputs.part_lse, (item.part, h, row), lse, real & ~whole),
        ]
    for _, lse_ref, place, value, mask in targets:
        plgpu.store(lse_ref.at[place], value, mask=mask)
    gains = case.v.gains(case.asm)
    for acc, gain, (start, size) in zip(state.accs, gains, columns(case.v), strict=True):
        acc = acc * gain
        if len(case.v_factors) > 1:
            acc = acc + axes.by_row(zero_sum)
        y = jnp.where(axes.by_row(seen), acc * axes.by_row(norm), 0.0)
        y = y.T if axes.transposed else y
        column = int(start) + jnp.arange(size, dtype=jnp.int32)
        column = jnp.broadcast_to(column[None], y.shape)
        for out_ref, _, place, _, mask in targets:
            place = (x if jnp.ndim(x) == 0 else _spread(x, y.shape) for x in place)
            mask = _spread(mask, y.shape)
            plgpu.store(out_ref.at[(*place, column)], y.astype(out_ref.dtype), mask=mask)


def _spread(x, shape):
    """Repeats a vector over rows along the columns of a tile."""
    return jnp.broadcast_to(x[:, None], shape)
