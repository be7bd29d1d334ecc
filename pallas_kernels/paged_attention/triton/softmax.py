"""Attention of one kv head's rows over the blocks of an item: scores, online softmax, values.

Scores and running sums are in base 2. A token's scale multiplies its scores and probabilities, and
its zero is added by a rank-1 term, so codes are never dequantized one by one.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.codecs.factors import FLOAT16_MAX
from pallas_kernels.paged_attention.triton.address import Address
from pallas_kernels.paged_attention.triton.axes import Axes, row_index
from pallas_kernels.paged_attention.triton.base2 import LOG2E, exp2
from pallas_kernels.paged_attention.triton.blocks import Blocks, Item, blocks_of
from pallas_kernels.paged_attention.triton.case import Case
from pallas_kernels.paged_attention.triton.levels import factor_value
from pallas_kernels.paged_attention.triton.means import load_bias
from pallas_kernels.paged_attention.triton.operands import Inputs
from pallas_kernels.paged_attention.triton.readers import Reader
from pallas_kernels.paged_attention.triton.tile_sizes import DecodeConfig
from pallas_kernels.segment import NOTHING_SEEN, Span

# Probabilities in float16 are scaled to at most 2^4, so that small ones keep more bits. A product
# with a factor of up to 4094 still fits into float16; larger factors saturate, as they do for a
# token that is not finite.
FLOAT16_OFFSET = 4.0
FLOAT32_MAX = float(np.finfo(np.float32).max)


class State(NamedTuple):
    """Running sums of each row."""

    m: jax.Array  # f32[rows], maximum of the scores
    l: jax.Array  # sum of exp2(score - m); shape as in `Axes.no_sum`
    zero_sum: jax.Array  # like l, each term times the zero of the token's values
    accs: tuple[jax.Array, ...]  # the sum weighted by values, a tile for each of their operands


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemAttention:
    """Everything that stays the same over the blocks of an item, and the loop over them."""

    refs: Inputs
    case: Case
    config: DecodeConfig
    axes: Axes
    blocks: Blocks
    q_start: Any  # i32[], position of the first query
    q_len: Any  # i32[], real query tokens
    row_token: Any  # i32[rows], query token of each row
    q: list[jax.Array]  # [rows, columns] for each operand of the keys
    k_shifts: Any  # from the key reader's `load_shifts`
    v_shifts: Any  # from the value reader's
    k_gain: float  # factor that the sum of the operands' dots still lacks
    row_sum: Any  # sum of q over dims, to multiply by a key's zero; None where keys have no zero

    @property
    def rows(self) -> int:
        """Rows per tile, padding included."""
        return self.row_token.shape[0]

    @property
    def offset(self) -> float:
        """Base-2 logarithm of the largest probability."""
        return FLOAT16_OFFSET if self.case.v.dtype == "float16" else 0.0

    def run(self) -> State:
        """Attends all blocks; where the case allows it, blocks that every row sees get no mask."""
        case, blocks, size = self.case, self.blocks, self.config.block
        state, count = self._start(), blocks.count
        if self.config.mask_all or case.sink_pages or case.rule.needs_mask(1):
            return self._loop(0, count, state, masked=True)
        low, high = blocks.seen
        if case.q_tokens > 1:  # a single query sees all of its span
            low, high = case.rule.seen_by_all(self.q_start, self.q_len, low, high)
        first, length = blocks.first, blocks.length
        whole_start = jnp.clip(pl.cdiv(jnp.maximum(low - first, 0), size), 0, count)
        whole_stop = jnp.minimum(high - first, length) // size
        whole_stop = jnp.clip(whole_stop, whole_start, count)
        state = self._loop(whole_start, whole_stop, state, masked=False)
        edge = lambda e: jnp.where(e < whole_start, e, e - whole_start + whole_stop)
        edges = whole_start + count - whole_stop
        return self._loop(0, edges, state, masked=True, number=edge)

    def run_isolated(self) -> State:
        """Attends all blocks; values that are not finite make NaN only in rows that see them."""
        return self._loop(0, self.blocks.count, self._start(), masked=True, isolated=True)

    def is_spoiled(self, state: State):
        """Whether a sum of values is not finite in some row that is no padding, `bool[]`."""
        real = self.axes.by_row(self.row_token < self.q_len)
        bad = [jnp.where(real & ~(jnp.abs(x) <= FLOAT32_MAX), 1, 0) for x in state.accs]
        return functools.reduce(jnp.maximum, map(jnp.max, bad)) > 0

    def _start(self) -> State:
        axes, rows, block = self.axes, self.rows, self.config.block
        return State(
            jnp.full((rows,), NOTHING_SEEN, jnp.float32),
            axes.no_sum(rows, block),
            axes.no_sum(rows, block),
            tuple(
                jnp.zeros(axes.shape(rows, size), jnp.float32) for _, size in columns(self.case.v)
            ),
        )

    def _loop(
        self, start, stop, state: State, *, masked: bool, isolated=False, number=lambda e: e
    ) -> State:
        """Attends the blocks `number(e)` for `start <= e < stop`; options as in `_attend`.

        Each step looks up the next step's page. Each load that an address depends on uses up one of
        Triton's pipeline stages; the rest is how far ahead words are copied. If the page were
        loaded in its own step, three stages would copy nothing ahead.
        """
        blocks = self.blocks
        page_of_start = blocks.look_up(number(start))
        attend = functools.partial(self._attend, masked=masked, isolated=isolated)
        if self.refs.table.shape[1] == 1:
            # Every step has the same page. Triton would move its load out of the loop, and then
            # fails on the loop's carry.
            step = lambda e, state: attend(number(e), state, page_of_start)
            return jax.lax.fori_loop(start, stop, step, state)

        def step_ahead(e, carry):
            state, page = carry
            ahead = blocks.look_up(number(jnp.minimum(e + 1, stop - 1)))
            return attend(number(e), state, page), ahead

        return jax.lax.fori_loop(start, stop, step_ahead, (state, page_of_start))[0]

    def _attend(self, i, state: State, page, *, masked: bool, isolated: bool) -> State:
        """Adds block `i`, whose page is `page`, to the running sums.

        `masked` hides what a row does not see. `isolated` keeps values that are not finite out of
        the dot, and makes their channels NaN in the rows that see them.
        """
        case, axes = self.case, self.axes
        address, positions, inside = self.blocks.locate(i, page, masked=masked)
        factors = self._load_factors(address) if self.config.early_factors else None
        k_words = case.k.load([self.refs.pools[name] for name in case.k.arrays], address)
        v_refs = [self.refs.pools[name] for name in case.v.arrays]
        v_words = case.v.load(v_refs, address, dims_first=axes.transposed)
        operands = case.k.operands(k_words, case.asm, self.k_shifts)
        # `map` is lazy, so each dot is next to its addition: Triton's register use depends on it.
        dots = functools.reduce(operator.add, map(axes.scores, operands, self.q))
        words = self._load_factors(address) if factors is None else factors
        k_factors, v_factors = (
            [factor_value(words[x.array, x.row], x.half) for x in side]
            for side in (case.k_factors, case.v_factors)
        )
        s = self._scores(dots, k_factors, address)
        ok = self._sees(positions, inside) if masked else None
        if ok is not None:
            s = jnp.where(ok, s, NOTHING_SEEN)
        m_new = jnp.maximum(state.m, jnp.max(s, axis=axes.tokens))
        shrink = exp2(state.m - m_new, case.asm)
        p = exp2(s - axes.by_row(m_new - self.offset), case.asm)
        if ok is not None:
            p = jnp.where(ok, p, 0.0)
        l, zero_sum = axes.add(state.l, shrink, p), state.zero_sum
        if v_factors:
            if len(v_factors) > 1:
                zero_sum = axes.add(zero_sum, shrink, p * axes.by_token(v_factors[1]))
            factor = jnp.minimum(v_factors[0], FLOAT16_MAX / 2.0**self.offset)
            p = p * axes.by_token(factor)
        p = p.astype(case.v.dtype)
        values = case.v.operands(v_words, case.asm, self.v_shifts, dims_first=axes.transposed)
        outputs = lambda acc, v: acc * axes.by_row(shrink) + axes.outputs(p, v)
        if isolated:
            outputs = _isolate(outputs, axes, ok)
        return State(m_new, l, zero_sum, tuple(map(outputs, state.accs, values)))

    def _scores(self, dots, k_factors: list[jax.Array], address: Address):
        """Scores in base 2 from the dots of queries and levels."""
        case, axes = self.case, self.axes
        gain = self.k_gain * case.score_scale
        if k_factors:
            s = dots * axes.by_token(k_factors[0] * gain)
        else:
            s = dots if gain == 1.0 else dots * gain
        if self.row_sum is not None:
            s = s + axes.by_token(k_factors[1]) * self.row_sum
        if self.refs.bias is not None:
            s = s + load_bias(self.refs.bias, self.blocks.b, address, axes, self.rows)
        if case.soft_cap is not None:
            cap = case.soft_cap * LOG2E
            s = cap * jnp.tanh(s * (1.0 / cap))
        return s

    def _sees(self, positions, inside):
        """Mask of which row sees which token, in the orientation of the scores."""
        case, axes = self.case, self.axes
        if not case.masks_rows:
            return axes.by_token(inside)
        i, j = axes.by_row(self.q_start + self.row_token), axes.by_token(positions)
        seen = case.rows_see(i, j)
        return seen & axes.by_token(inside) & axes.by_row(self.row_token < self.q_len)

    def _load_factors(self, address: Address) -> dict[tuple[str, int], jax.Array]:
        """Words of factors by array and row; a word that holds two factors is loaded once."""
        places = self.case.k_factors + self.case.v_factors
        words = dict.fromkeys((x.array, x.row) for x in places)
        return {(name, row): address.load_factor(self.refs.pools[name], row) for name, row in words}


def _isolate(outputs, axes: Axes, ok):
    """`outputs(acc, v)`, but `v` that is not finite makes NaN only in rows that see it (`ok`)."""

    def isolated(acc, v):
        finite = _is_finite(v)
        acc = outputs(acc, jnp.where(finite, v, jnp.zeros_like(v)))
        spoiled = axes.outputs(ok.astype(v.dtype), jnp.where(finite, 0, 1).astype(v.dtype))
        return jnp.where(spoiled > 0, jnp.nan, acc)

    return isolated


def _is_finite(x: jax.Array) -> jax.Array:
    """Whether floats are neither NaN nor infinite, by their bits: no wider type in registers."""
    bits = jax.lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
    infinity = np.asarray(np.inf, x.dtype).view(bits.dtype)
    return (bits & infinity) != infinity


def item_attention(
    refs: Inputs, h, item: Item, *, case: Case, config: DecodeConfig
) -> ItemAttention:
    """Loads everything that stays the same over an item's blocks, for the rows of kv head `h`."""
    b, layer, bounds = item.b, refs.layer[0], refs.bounds
    seen = Span(*(ref[b] for ref in bounds.run))
    q_start, q_len = bounds.q_start[b], refs.q_lens[b]
    axes = Axes(config.transposed)
    rows = padded_rows(case, config)
    row_token, row_head = row_index(rows, group=case.group, q_tokens=case.q_tokens)
    row_head = row_head + h * case.group
    q = [
        refs.q[b, row_token, row_head, pl.ds(int(start), size)].astype(case.k.dtype)
        for start, size in columns(case.k)
    ]
    k_shifts = case.k.load_shifts(refs.k_shifts)
    v_shifts = case.v.load_shifts(refs.v_shifts, dims_first=axes.transposed)
    row_sum = None
    if len(case.k_factors) > 1:
        row_sum = axes.by_row(sum(jnp.sum(x.astype(jnp.float32), axis=1) for x in q))
    gains = case.k.gains(case.asm)
    # All operands must share one gain, so the query of each is scaled by gain / first gain (a power
    # of two, hence exact).
    q = [x if g == gains[0] else x * (g / gains[0]) for x, g in zip(q, gains, strict=True)]
    return ItemAttention(
        refs=refs,
        case=case,
        config=config,
        axes=axes,
        blocks=blocks_of(
            item, refs, case, size=config.block, head=h, layer=layer, q_start=q_start, seen=seen
        ),
        q_start=q_start,
        q_len=q_len,
        row_token=row_token,
        q=q,
        k_shifts=k_shifts,
        v_shifts=v_shifts,
        k_gain=gains[0],
        row_sum=row_sum,
    )


def padded_rows(case: Case, config: DecodeConfig) -> int:
    """Query rows per kv head, rounded up to the tile of a dot."""
    return max(8 if config.transposed else 16, pl.next_power_of_2(case.rows))


def columns(reader: Reader) -> list[tuple[int, int]]:
    """`(start, size)` of each operand's dims in the reader's order."""
    sizes = [len(dims) for dims in reader.dims]
    return list(zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True))
