"""The GPU kernel: a token that is not finite changes no row that does not see it."""

import dataclasses

import pytest

from pallas_kernels.rule import CAUSAL, PageLag, Rule
from pallas_kernels.segment import Segment
from tests.pallas_kernels.paged_attention.isolation import attend_by, check_isolation
from tests.pallas_kernels.paged_attention.triton.kernel_cases import (
    EDGES,
    SMALL,
    TOLERANCE,
    TRANSPOSED,
    make_case,
)

# Poisoned in pages that all queries see, at borders of pages and blocks, and within the queries.
POSITIONS = (0, 15, 16, 31, 32, 58, 59, 63, 64, 66, 68, 69)
BATCH = dict(lengths=(70,) * len(POSITIONS), group=2, kv_heads=1)
WINDOW = Rule(window=9, sink_tokens=2)
CHUNKS = {
    "full": ("bfloat16", 12, CAUSAL),
    "window, sinks": ("float16", 12, WINDOW),
    "recent pages": ("bfloat16", 12, Rule(lag=PageLag(16, most=2))),
}
VERIFY = {
    "flat": ("bfloat16", SMALL, CAUSAL),
    "edges": ("bfloat16", EDGES, Rule(window=9)),
    "transposed": ("bfloat16", TRANSPOSED, WINDOW),
    "float32": ("float32", EDGES, CAUSAL),
}


@pytest.mark.parametrize("store, tokens, rule", CHUNKS.values(), ids=CHUNKS)
def test_chunks(store, tokens, rule, interpret):
    case = make_case(store, q_lens=(tokens,) * len(POSITIONS), **BATCH)
    attend = attend_by(rule=rule, backend="gpu", interpret=interpret)
    check_isolation(case, attend, POSITIONS, rule, tolerance=TOLERANCE[store])


@pytest.mark.parametrize("store, config, rule", VERIFY.values(), ids=VERIFY)
def test_verify(store, config, rule, interpret):
    case = make_case(store, q_lens=(4,) * len(POSITIONS), **BATCH)
    attend = lambda case: case.attend_kernel(rule, config=config, interpret=interpret)
    check_isolation(case, attend, POSITIONS, rule, tolerance=TOLERANCE[store])


@pytest.mark.parametrize("pinned", [False, True], ids=["in the ring", "pinned"])
def test_one_query_passes_over_the_gap_behind_sinks(pinned, interpret):
    case = make_case(**BATCH)
    if pinned:  # the sinks' page is in a table of its own, and the run begins behind it
        segment = case.segment
        pins = Segment(segment.table, segment.start + 16, segment.stop, segment.table[:, :1])
        case = dataclasses.replace(case, segment=pins)
    attend = lambda case: case.attend_kernel(WINDOW, config=EDGES, interpret=interpret)
    check_isolation(case, attend, (1, 2, 15, 16, 31, 60, 61, 62, 64, 66, 68, 69), WINDOW)
