"""Shares hold every page once and are as even as promised; parts are where the merge reads them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.triton import work_list
from pallas_kernels.paged_attention.triton.span import SpanPages
from tests.pallas_kernels.paged_attention.paged_cases import on_the_device

pytestmark = pytest.mark.both_pythons


# Batches are padded to two sizes, and each of a few shares serves several of them: every pair is
# compiled once.
SHARES = [
    (40, dict(wanted=3, least=1, fewest=2, good=1)),
    (40, dict(wanted=17, least=2, fewest=40, good=13)),
    (40, dict(wanted=45, least=4, fewest=9, good=7)),
    (400, dict(wanted=60, least=1, fewest=33, good=19)),
    (400, dict(wanted=390, least=3, fewest=48, good=2)),
]


def random_lengths_in_pages(rng, most):
    lengths = rng.integers(0, 90, rng.integers(1, most)) * (rng.random() < 0.9)
    lengths = lengths * (rng.random(len(lengths)) < 0.7)
    return np.pad(lengths, (0, most - len(lengths))).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("shares", "interpret"))
def plan(pages, shares, interpret):
    find_span = lambda x: SpanPages(jnp.zeros_like(x["pages"]), x["pages"])
    return work_list.plan_work({"pages": pages}, find_span, shares, interpret)


@pytest.mark.parametrize("alike", [False, True], ids=["ragged", "alike"])
def test_shares_cover_every_page_once_and_are_even(alike, interpret):
    rng = np.random.default_rng(0)
    was_whole = 0
    for most, shares in 3 * SHARES:
        pages = random_lengths_in_pages(rng, most)
        if alike:
            pages = np.where(pages, 60, 0).astype(np.int32)
        least, fewest = shares["least"], shares["fewest"]
        programs = min(shares["wanted"], most * -(-90 // least))
        asked = work_list.Shares(
            programs=programs,
            fewest=min(programs, fewest),
            good_pages=shares["good"],
            least_pages=least,
        )
        with on_the_device():
            work = plan(pages, asked, interpret)
        work = jax.tree.map(np.asarray, work)
        seen, parts = [[] for _ in pages], [[] for _ in pages]
        got = []
        for p in range(programs):
            got.append(0)
            for k in range(work.first[p], work.stop[p]):
                b, before = work.sequence[k], work.before[k]
                start = max(work.low[p] - before, 0)
                stop = min(work.high[p] - before, pages[b])
                assert start < stop
                seen[b] += range(start, stop)
                parts[b].append(p + k)
                got[-1] += stop - start
        assert seen == [list(range(n)) for n in pages]
        total = pages.sum()
        even = max(-(-total // programs), least)
        even = max(even, min(asked.good_pages, -(-total // asked.fewest)))
        assert max(got) <= even + even // 16
        is_whole = np.all(work.stop - work.first <= 1)
        was_whole += is_whole and total > 0
        if not is_whole:
            assert max(got) <= even and sum(x > 0 for x in got) == -(-total // even)
        for b, mine in enumerate(parts):
            first, n = work.first_part[b], work.part_count[b]
            assert mine == list(range(first, first + n))
        every = sum(parts, [])
        assert len(set(every)) == len(every)
        assert all(0 <= part < programs + len(pages) for part in every)
    assert was_whole if alike else was_whole < 15
