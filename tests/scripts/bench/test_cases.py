"""scripts/bench/cases.py: grids and suites name things that exist."""

import pytest

from jaxkv.codecs import codec_names
from models.random_weights import SHAPES
from scripts.bench.cases import GRIDS, SUITES, WORKLOADS
from scripts.bench.problems import make_problem


def test_the_published_suite_names_known_things():
    suite = SUITES["published"]
    assert len(set(suite)) == len(suite)
    assert {one.workload for one in suite} <= set(WORKLOADS)
    assert {one.codec for one in suite} <= set(codec_names())
    pools = [one for one in suite if one.layers]
    for one in pools:  # the largest array of each
        problem = make_problem(one)
        assert problem.sizes.layers * problem.sizes.layer_bytes > 2 * 2**32


@pytest.mark.parametrize("command", GRIDS)
def test_grids_name_known_things(command):
    grid = GRIDS[command]
    known = SHAPES if command in ("step", "prefill") else ["smollm2", *WORKLOADS]
    assert set(grid.models) <= set(known) and set(grid.codecs) <= set(codec_names())


def test_a_grid_is_every_combination_exact_first():
    cases = GRIDS["decode"].cases()
    grid = GRIDS["decode"]
    sizes = map(len, (grid.models, grid.batches, grid.contexts, grid.codecs))
    models, batches, contexts, codecs = sizes
    assert len(set(cases)) == len(cases) == models * batches * contexts * codecs
    assert [case.codec for case in cases[:2]] == ["exact", "4bit_nc"]
    assert cases[0].group == cases[1].group == "llama-3-8b b1 1k"
