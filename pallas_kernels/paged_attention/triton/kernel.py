"""The attention kernel: a program attends its share of the pages, sequence by sequence."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.triton.base2 import LN2
from pallas_kernels.paged_attention.triton.blocks import Item
from pallas_kernels.paged_attention.triton.case import Case
from pallas_kernels.paged_attention.triton.operands import Inputs, Outputs
from pallas_kernels.paged_attention.triton.readers import LEAST_COLUMNS
from pallas_kernels.paged_attention.triton.softmax import (
    ItemAttention,
    State,
    columns,
    item_attention,
)
from pallas_kernels.paged_attention.triton.tile_sizes import DecodeConfig
from pallas_kernels.segment import NOTHING_SEEN
from pallas_kernels.shapes import Operand


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
    """Attends an item's pages and stores the result of kv head `h`'s rows.

    A value that is not finite reaches every row of its block, because 0 * NaN is NaN, and must
    change only the rows that see it. That is rare, so it is not prevented but noticed in the
    result: then all is done once more, with more care.
    """
    attention = item_attention(refs, h, item, case=case, config=config)
    state = attention.run()
    _store(outputs, h, item, attention, state)
    if not case.masks_rows or case.v.always_finite:
        return

    @pl.when(attention.is_spoiled(state))
    def _():
        # Small blocks, so that this takes no more registers than what always runs.
        small = dataclasses.replace(config, block=LEAST_COLUMNS)
        careful = item_attention(refs, h, item, case=case, config=small)
        _store(outputs, h, item, careful, careful.run_isolated())


class Target(NamedTuple):
    """Where results of an item's rows go."""

    out: Operand
    lse: Operand
    place: tuple  # indices of each row
    rows: jax.Array  # bool[rows], which of them are stored


def _targets(outputs: Outputs, h, item: Item, attention: ItemAttention) -> list[Target]:
    """The result, if the item is its sequence's only part; otherwise a part to be merged."""
    case = attention.case
    row = jnp.arange(attention.rows, dtype=jnp.int32)
    # Padding rows are masked and also out of bounds: the interpreter writes to masked places, too.
    real = row < case.rows
    at = (item.b, row // case.group, row % case.group + h * case.group)
    work = attention.refs.work
    if item.part is None or work is None:
        return [Target(outputs.out, outputs.lse, at, real)]
    whole = work.part_count[item.b] == 1
    part = (item.part, h, row)
    return [
        Target(outputs.out, outputs.lse, at, real & whole),
        Target(outputs.part, outputs.part_lse, part, real & ~whole),
    ]


def _store(outputs: Outputs, h, item: Item, attention: ItemAttention, state: State):
    """Stores outputs and log-sum-exps of an item's rows."""
    case, axes = attention.case, attention.axes
    m, l = state.m - attention.offset, axes.total(state.l)
    zero_sum = axes.total(state.zero_sum)
    # `l` is NaN where a row sees a key that is: its result must not look like that of an empty row.
    seen = (l != 0) & (attention.row_token < attention.q_len)
    total = jnp.where(seen, l, 1.0)
    norm = jnp.where(seen, 1.0 / total, 0.0)
    lse = jnp.where(seen, m + jnp.log2(total), NOTHING_SEEN)
    natural = jnp.where(seen, lse * LN2, -jnp.inf)
    targets = _targets(outputs, h, item, attention)
    for target, value in zip(targets, (natural, lse), strict=False):
        plgpu.store(target.lse.at[target.place], value, mask=target.rows)
    gains = case.v.gains(case.asm)
    for acc, gain, (start, size) in zip(state.accs, gains, columns(case.v), strict=True):
        acc = acc * gain
        if len(case.v_factors) > 1:
            acc = acc + axes.by_row(zero_sum)
        y = jnp.where(axes.by_row(seen), acc * axes.by_row(norm), 0.0)
        for target in targets:
            _store_tile(target, start, size, attention, y)


def _store_tile(target: Target, start, size, attention: ItemAttention, y):
    """Stores columns `start` to `start + size` of the output rows; `y` is oriented as `accs`."""
    axes, shape = attention.axes, (attention.rows, size)
    column = int(start) + jnp.arange(size, dtype=jnp.int32)
    column = jnp.broadcast_to(column[None], shape)
    place = (x if jnp.ndim(x) == 0 else _spread(x, shape) for x in target.place)
    mask = _spread(target.rows, shape)
    y = y.T if axes.transposed else y
    plgpu.store(target.out.at[(*place, column)], y.astype(target.out.dtype), mask=mask)


def _spread(x, shape):
    """Repeats a vector over rows along the columns of a tile."""
    return jnp.broadcast_to(x[:, None], shape)
