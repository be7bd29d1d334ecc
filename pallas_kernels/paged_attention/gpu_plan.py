"""Which pages each program attends: equal shares of all pages, whatever the sequences.

A static number of splits a sequence leaves most of the chip idle when lengths differ; a whole
number of them, chosen by length, still does when there are about as many sequences as programs run
at once. Here the grid is static and what a program covers is chosen at run time, by one small
kernel: XLA makes about ten of the same sums, and layers alike share it.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.gpu_split import SpanPages
from pallas_kernels.paged_attention.gpu_tiles import DecodeConfig

TRIES = 9  # sizes of whole parts that are tried, from the even share to a sixteenth more
SEQUENCES = 128  # looked at in one step
PROGRAMS = 8  # whose shares one program of this kernel finds


class WorkList(NamedTuple):
    """Which pages each program attends, and where the parts of a sequence are.

    The pages of all sequences stand in a row, and each program has a stretch of it. Sequences that
    have pages are counted by `k`, in order; what program `p` finds in sequence `k` is part `p + k`:
    from one part to the next `p` or `k` grows, so none has two owners, and those of a sequence
    are neighbours.
    """

    low: jax.Array  # i32[programs], first page of a program's stretch
    high: jax.Array  # i32[programs], one past its last
    first: jax.Array  # i32[programs], first sequence `k` of the stretch
    stop: jax.Array  # i32[programs], one past its last
    sequence: jax.Array  # i32[batch], by `k`; unset where no sequence has that `k`
    before: jax.Array  # i32[batch], pages of all sequences before `k`; likewise
    first_part: jax.Array  # i32[batch]
    part_count: jax.Array  # i32[batch], 0 for a sequence without pages


class Shares(NamedTuple):
    """What of the shares is known when a call is traced."""

    programs: int  # as many as are launched; the last ones may get nothing
    fewest: int  # that fill the chip once; no more where shares would be below `good_pages`
    good_pages: int  # from which on a program's own costs (start, merge) do not matter
    least_pages: int  # no share is made smaller, but the last one and short sequences


def choose_shares(
    config: DecodeConfig, *, batch: int, kv_heads: int, page_size: int, most_pages: int, sms: int
) -> Shares | None:
    """How the pages of a kv head are shared out; None for a program a sequence.

    Args:
      config: tile sizes.
      batch: sequences.
      kv_heads: each has as many programs as the others.
      page_size: tokens of a page.
      most_pages: of a sequence.
      sms: of the GPU.
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
    scalars: dict[str, jax.Array],
    find_span: Callable[[dict[str, Any]], SpanPages],
    shares: Shares,
    interpret: bool = False,
) -> WorkList:
    """Shares pages out evenly among programs, whatever the lengths of sequences.

    Where whole parts of sequences are nearly as even, programs take those: each sequence that one
    begins costs it a start.

    Args:
      scalars: `i32[batch]` each, what `find_span` needs.
      find_span: the pages of a sequence, from its `scalars`.
      shares: how many there are to be, and how large at least.
      interpret: run on the CPU.
    """
    [batch] = next(iter(scalars.values())).shape
    programs = shares.programs
    sizes = [programs] * 4 + [batch] * 4
    return WorkList(
        *pl.pallas_call(
            functools.partial(
                _plan_kernel, names=tuple(scalars), find_span=find_span, shares=shares
            ),
            out_shape=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes],
            grid=(max(pl.cdiv(programs, PROGRAMS), pl.cdiv(batch, SEQUENCES)),),
            compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
            interpret=interpret,
            name="plan_work",
        )(*scalars.values())
    )


def _plan_kernel(*refs, names, find_span, shares: Shares):
    """The shares of `PROGRAMS` programs and the parts of `SEQUENCES` sequences.

    Every program of this kernel goes through all sequences: nothing waits for another's sums.
    """
    scalars = dict(zip(names, refs, strict=False))
    out: dict[str, Any] = dict(zip(WorkList._fields, refs[len(names) :], strict=True))
    [batch] = out["sequence"].shape

    def fold(step, init):
        """Folds `step(sequences, their pages, state)` over chunks of them."""
        rows = min(SEQUENCES, pl.next_power_of_2(batch))

        def load(chunk, state):
            b = chunk * rows + jnp.arange(rows, dtype=jnp.int32)
            at = jnp.minimum(b, batch - 1)
            pages = find_span({name: ref[at] for name, ref in scalars.items()}).pages
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
        _put(out["first_part"], b, program + rank, mine)
        _put(out["part_count"], b, parts, mine)
        _put(out["sequence"], rank, b, mine & (used > 0))
        _put(out["before"], rank, begin, mine & (used > 0))

        # A program's whole part: sums with one term, that of the sequence it lies in.
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
        _put(out[name], p, jnp.where(is_whole, of_whole, of_even), p < shares.programs)


def _whole_size(fold, even, programs: int):
    """Pages of whole parts, and whether some that are nearly even are few enough for `programs`."""
    tries = jnp.minimum(jnp.arange(pl.next_power_of_2(TRIES), dtype=jnp.int32), TRIES - 1)
    sizes = even + lax.div(even * tries, jnp.int32(16 * (TRIES - 1)))
    count = lambda b, pages, x: x + jnp.sum(_cdiv(pages[None], sizes[:, None]), axis=1)
    fits = fold(count, jnp.zeros_like(sizes)) <= programs
    size = jnp.min(jnp.where(fits, sizes, 2**30))
    return jnp.where(size < 2**30, size, even), size < 2**30


def _put(ref, at, x, ok):
    """Stores `x` where `ok`; elsewhere out of bounds: the interpreter writes back what it masks."""
    plgpu.store(ref.at[jnp.where(ok, at, ref.shape[0])], x, mask=ok)


def _cdiv(x, y):
    """Of what is not negative."""
    x = x + (y - 1)
    return lax.div(x, jnp.broadcast_to(jnp.int32(y), x.shape))
