"""Shares hold every page once and are as even as promised; parts are where the merge reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.triton import work_list
from pallas_kernels.paged_attention.triton.span import SpanPages
from tests.pallas_kernels.paged_attention.paged_cases import on_the_device

pytestmark = pytest.mark.both_pythons


def random_lengths_in_pages(rng, most):
    lengths = rng.integers(0, 90, rng.integers(1, most)) * (rng.random() < 0.9)
    return lengths * (rng.random(len(lengths)) < 0.7)


@pytest.mark.parametrize("alike", [False, True], ids=["ragged", "alike"])
def test_shares_cover_every_page_once_and_are_even(alike, interpret):
    rng = np.random.default_rng(0)
    was_whole = 0
    for most in [40] * 10 + [400] * 4:
        pages = random_lengths_in_pages(rng, most)
        if alike:
            pages = np.where(pages, 60, 0)
        least, wanted = int(rng.integers(1, 5)), int(rng.integers(1, most + 10))
        programs = min(wanted, len(pages) * -(-90 // least))
        asked = work_list.Shares(
            programs=programs,
            fewest=min(programs, int(rng.integers(1, 50))),
            good_pages=int(rng.integers(1, 20)),
            least_pages=least,
        )
        with on_the_device():
            work = work_list.plan_work(
                {"pages": np.asarray(pages, np.int32)},
                lambda x: SpanPages(jnp.zeros_like(x["pages"]), x["pages"]),
                asked,
                interpret,
            )
        work = jax.tree.map(np.asarray, work)
        seen, parts = [[] for _ in pages], [[] for _ in pages]
        shares = []
        for p in range(programs):
            shares.append(0)
            for k in range(work.first[p], work.stop[p]):
                b, before = work.sequence[k], work.before[k]
                start = max(work.low[p] - before, 0)
                stop = min(work.high[p] - before, pages[b])
                assert start < stop
                seen[b] += range(start, stop)
                parts[b].append(p + k)
                shares[-1] += stop - start
        assert seen == [list(range(n)) for n in pages]
        total = pages.sum()
        even = max(-(-total // programs), least)
        even = max(even, min(asked.good_pages, -(-total // asked.fewest)))
        assert max(shares) <= even + even // 16
        is_whole = np.all(work.stop - work.first <= 1)
        was_whole += is_whole and total > 0
        if not is_whole:
            assert max(shares) <= even and sum(x > 0 for x in shares) == -(-total // even)
        for b, mine in enumerate(parts):
            first, n = work.first_part[b], work.part_count[b]
            assert mine == list(range(first, first + n))
        every = sum(parts, [])
        assert len(set(every)) == len(every)
        assert all(0 <= part < programs + len(pages) for part in every)
    assert was_whole if alike else was_whole < 14
