"""Which pages each program attends: equal shares of all pages, whatever the sequences' lengths.

With a fixed number of splits per sequence most of the chip idles when lengths differ. Choosing the
number by length does not help when there are about as many sequences as programs. Here the grid is
static and a small kernel chooses each program's share at run time; written in plain JAX, the same
sums would be about ten kernels. Layers that are alike share its result.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.triton.span import SpanPages
from pallas_kernels.paged_attention.triton.tile_sizes import DecodeConfig
from pallas_kernels.shapes import Operand

TRIES = 9  # sizes of whole parts that are tried, from the even share to a sixteenth more
SEQUENCES = 128  # sequences that are looked at in one step
PROGRAMS = 8  # attention programs whose shares one program of this kernel finds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkList:
    """Which pages each program attends, and where the parts of a sequence are.

    The pages of all sequences stand in a row, and each program has a stretch of it. Number the
    non-empty sequences k = 0, 1, ... Program p stores its piece of sequence k as part p + k. Each
    next piece raises p or k by one, so no two pieces share a number, and the pieces of a sequence
    are neighbours.
    """

    low: Operand  # i32[programs], first page of a program's stretch
    high: Operand  # i32[programs], one past the stretch's last page
    first: Operand  # i32[programs], the `k` of the stretch's first sequence
    stop: Operand  # i32[programs], one past the `k` of its last sequence
    sequence: Operand  # i32[batch], row in the batch of sequence `k`; unset where there is no `k`
    before: Operand  # i32[batch], pages of all sequences before `k`; unset where there is no `k`
    first_part: Operand  # i32[batch], number of the first part of each row of the batch
    part_count: Operand  # i32[batch], its number of parts, 0 for a sequence without pages


class Shares(NamedTuple):
    """Bounds on the shares, known when a call is traced."""

    programs: int  # programs launched; the last ones may get nothing
    fewest: int  # programs that fill the chip once; no more get work if that makes shares too small
    good_pages: int  # large enough a share that a program's own costs (start, merge) do not matter
    least_pages: int  # no share is smaller, except the last one and short sequences


def choose_shares(
    config: DecodeConfig, *, batch: int, kv_heads: int, page_size: int, most_pages: int, sms: int
) -> Shares | None:
    """How the pages of a kv head are shared out; None for one program per sequence.

    Args:
      config: tile sizes.
      batch: number of sequences.
      kv_heads: number of kv heads; all get the same number of programs.
      page_size: tokens per page.
      most_pages: most pages that one sequence reads.
      sms: number of streaming multiprocessors of the GPU.
    """
    at_once = config.programs or config.at_once * sms
    wanted = at_once * (1 if config.programs else config.waves)
    least_pages = max(1, config.least_tokens // page_size)
    fills = batch * kv_heads >= at_once
    if most_pages <= least_pages or (config.unsplit and fills):
        return None
    programs = min(max(1, wanted // kv_heads), batch * pl.cdiv(most_pages, least_pages))
    return Shares(
        programs=programs,
        fewest=min(programs, max(1, at_once // kv_heads)),
        good_pages=1 if fills else max(1, config.good_tokens // page_size),
        least_pages=least_pages,
    )


def plan_work(
    bounds,
    find_span: Callable[..., SpanPages],
    shares: Shares,
    interpret: bool = False,
) -> WorkList:
    """Shares pages out evenly among programs, whatever the lengths of sequences.

    A program's stretch may cross from one sequence into the next, and each sequence in it costs a
    start. If cutting every sequence into parts of its own, one per program, is nearly as even, the
    list does that instead ("whole parts").

    Args:
      bounds: a pytree of `i32[batch]`, usually `span.Bounds`.
      find_span: returns the pages of a sequence, given its bounds.
      shares: how many shares there are, and how large they are at least.
      interpret: run on the CPU.
    """
    [batch] = jax.tree.leaves(bounds)[0].shape
    programs = shares.programs
    integers = lambda size: jax.ShapeDtypeStruct((size,), jnp.int32)
    return pl.pallas_call(
        functools.partial(_plan_kernel, find_span=find_span, shares=shares),
        out_shape=WorkList(
            low=integers(programs),
            high=integers(programs),
            first=integers(programs),
            stop=integers(programs),
            sequence=integers(batch),
            before=integers(batch),
            first_part=integers(batch),
            part_count=integers(batch),
        ),
        grid=(max(pl.cdiv(programs, PROGRAMS), pl.cdiv(batch, SEQUENCES)),),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="plan_work",
    )(bounds)


def _plan_kernel(bounds, out: WorkList, *, find_span, shares: Shares):
    """Finds the shares of `PROGRAMS` programs and the parts of `SEQUENCES` sequences.

    Every program of this kernel goes through all sequences, so that none waits for another's sums.
    """
    [batch] = out.sequence.shape

    def fold(step, init):
        """Folds `step(sequences, their pages, state)` over the batch, chunk by chunk."""
        rows = min(SEQUENCES, pl.next_power_of_2(batch))

        def load(chunk, state):
            b = chunk * rows + jnp.arange(rows, dtype=jnp.int32)
            at = jnp.minimum(b, batch - 1)
            pages = find_span(jax.tree.map(lambda ref: ref[at], bounds)).pages
            return step(b, jnp.where(b < batch, pages, 0), state)

        chunks = pl.cdiv(batch, rows)
        return load(0, init) if chunks == 1 else lax.fori_loop(0, chunks, load, init)

    total = fold(lambda b, pages, x: x + jnp.sum(pages), jnp.int32(0))
    good = jnp.minimum(jnp.int32(shares.good_pages), _cdiv(total, shares.fewest))
    even = jnp.maximum(jnp.maximum(_cdiv(total, shares.programs), good), shares.least_pages)
    size, is_whole = _whole_size(fold, even, shares.programs)
    i = pl.program_id(0)
    p = i * PROGRAMS + jnp.arange(PROGRAMS, dtype=jnp.int32)
    low, high = jnp.minimum(p * even, total), jnp.minimum((p + 1) * even, total)

    def share(b, pages, state):
        pages_before, parts_before, used_before, first, stop, whole = state
        used = (pages > 0).astype(jnp.int32)
        end, rank = pages_before + jnp.cumsum(pages), used_before + jnp.cumsum(used) - 1
        begin = end - pages
        whole_parts = _cdiv(pages, size)
        whole_program = parts_before + jnp.cumsum(whole_parts) - whole_parts
        program = jnp.where(is_whole, whole_program, lax.div(begin, even))  # first to see b
        even_parts = (lax.div(end - 1, even) + 1 - program) * used
        parts = jnp.where(is_whole, whole_parts, even_parts)

        mine = (b < batch) & (lax.div(b, jnp.int32(SEQUENCES)) == i)
        _put(out.first_part, b, program + rank, mine)
        _put(out.part_count, b, parts, mine)
        _put(out.sequence, rank, b, mine & (used > 0))
        _put(out.before, rank, begin, mine & (used > 0))

        # A program's whole part lies in one sequence: the sums pick that sequence's values.
        inside = (program[None] <= p[:, None]) & (p[:, None] < (program + parts)[None])
        pick = lambda x: jnp.sum(jnp.where(inside, x[None], 0), axis=1)
        among = lambda ok: jnp.sum(jnp.where(ok, used[None], 0), axis=1)
        return (
            pages_before + jnp.sum(pages),
            parts_before + jnp.sum(whole_parts),
            used_before + jnp.sum(used),
            first + among(end[None] <= low[:, None]),
            stop + among(begin[None] < high[:, None]),
            tuple(map(operator.add, whole, map(pick, (rank, begin, pages, program, parts)))),
        )

    zero, zeros = jnp.int32(0), jnp.zeros_like(p)
    state = fold(share, (zero, zero, zero, zeros, zeros, (zeros,) * 5))
    *_, first, stop, (rank, begin, pages, program, parts) = state
    least = lax.div(pages, jnp.maximum(parts, 1))
    edge = lambda n: begin + n * least + lax.div(n * (pages - parts * least), jnp.maximum(parts, 1))
    whole = dict(low=edge(p - program), high=edge(p - program + 1), first=rank, stop=rank + 1)
    for name, of_even in dict(low=low, high=high, first=first, stop=stop).items():
        of_whole = jnp.where(parts > 0, whole[name], 0)
        _put(getattr(out, name), p, jnp.where(is_whole, of_whole, of_even), p < shares.programs)


def _whole_size(fold, even, programs: int):
    """Size of whole parts in pages, and whether to use them.

    They are used if one of `TRIES` sizes near the even share needs no more parts than `programs`.
    """
    tries = jnp.minimum(jnp.arange(pl.next_power_of_2(TRIES), dtype=jnp.int32), TRIES - 1)
    sizes = even + lax.div(even * tries, jnp.int32(16 * (TRIES - 1)))
    count = lambda b, pages, x: x + jnp.sum(_cdiv(pages[None], sizes[:, None]), axis=1)
    fits = fold(count, jnp.zeros_like(sizes)) <= programs
    size = jnp.min(jnp.where(fits, sizes, 2**30))
    return jnp.where(size < 2**30, size, even), size < 2**30


def _put(ref, at, x, ok):
    """Stores `x` where `ok`.

    Other entries are sent out of bounds: the interpreter writes to masked places, too.
    """
    plgpu.store(ref.at[jnp.where(ok, at, ref.shape[0])], x, mask=ok)


def _cdiv(x, y):
    """`x / y` rounded up, for numbers that are not negative."""
    x = x + (y - 1)
    return lax.div(x, jnp.broadcast_to(jnp.int32(y), x.shape))
