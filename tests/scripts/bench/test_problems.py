"""scripts/bench/problems.py: cases are laid out right."""

import numpy as np
import pytest

from scripts.bench.cases import WORKLOADS, Case
from scripts.bench.problems import make_problem


def case(**options) -> Case:
    return Case(**dict(workload="tiny", batch=5, context=1000, codec="exact") | options)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("workload", ["tiny", "smollm2"])
def test_every_live_page_has_its_own_place(workload, ragged):
    problem = make_problem(case(workload=workload, ragged=ragged), page_size=16)
    window = WORKLOADS[workload].window or 10**9
    if not ragged:
        assert set(problem.lengths) == {1000}
    else:
        assert len(set(problem.lengths)) > 1
        assert problem.lengths.min() >= 125 and problem.lengths.max() <= 1375
    pages, tokens = [], 0
    for row, length in zip(problem.table, problem.lengths, strict=True):
        seen = range(max(0, length - window), length)
        pages += [row[page % len(row)] for page in {j // 16 for j in seen}]
        tokens += len(seen)
    assert len(set(pages)) == len(pages) and 0 not in pages
    assert max(pages) < problem.sizes.pages
    shape = problem.sizes.workload
    assert problem.read_bytes == tokens * 2 * shape.kv_heads * shape.head_dim * 2


def test_spans_hold_the_window_within_the_ring():
    problem = make_problem(case(), page_size=16)
    for lengths in (problem.lengths, problem.random_lengths()):
        spans = {name: np.asarray(x) for name, x in problem.spans(lengths).items()}
        assert (spans["kv_stop"] == lengths).all() and (spans["q_start"] == lengths - 1).all()
        assert (spans["kv_start"] <= np.maximum(lengths - 80, 0)).all()
        pages = -(-lengths // 16) - spans["kv_start"] // 16
        assert (pages <= problem.sizes.width).all()
    assert (problem.random_lengths() <= problem.lengths).all()
