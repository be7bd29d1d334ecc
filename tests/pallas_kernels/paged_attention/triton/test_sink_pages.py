"""The GPU kernel reads sink pages from their own table as the reference backend does."""

import dataclasses

import jax.numpy as jnp
import pytest

from pallas_kernels.rule import PageLag, Rule
from tests.pallas_kernels.paged_attention.triton.kernel_cases import assert_close, make_case

CASES = {
    "window": ("bfloat16", (1, 1, 1, 1, 1), dict(rule=Rule(window=40, sink_tokens=5))),
    "recent pages, drafts": ("bfloat16", (3, 2, 4, 1, 4), dict(rule=Rule(lag=PageLag(16, most=1)))),
    "codes, drafts": ("fp8_e4m3", (2, 1, 4, 1, 3), dict(rule=Rule(window=27, sink_tokens=20))),
    "a chunk": ("bfloat16", (4, 31, 30, 2, 60), dict(rule=Rule(window=27, sink_tokens=20))),
}
# The rules and readers of the cases added here are covered above too, so these run only in the
# harder test, whose shares cross sequences.
SHARED = CASES | {
    "window, drafts": ("bfloat16", (3, 2, 4, 0, 4), dict(rule=Rule(window=27, sink_tokens=20))),
    "recent pages": ("bfloat16", (1, 1, 1, 1, 1), dict(rule=Rule(lag=PageLag(16, most=2)))),
    "means": ("tq4", (1, 1, 1, 1, 1), dict(rule=Rule(window=70, sink_tokens=32))),
    "a chunk, recent pages": (
        "bfloat16",
        (4, 31, 30, 0, 60),
        dict(rule=Rule(lag=PageLag(16, most=2))),
    ),
}


def check_case(store, q_lens, options, interpret):
    """Attends sequences that end within the sink pages, at their end, just behind, and far off."""
    case = make_case(store, lengths=(4, 31, 36, 49, 250), q_lens=q_lens)
    table = case.segment.table
    segment = dataclasses.replace(
        case.segment,
        table=table.at[:, :2].set(10**6),
        start=jnp.full(5, 2 * 16, jnp.int32),
        sinks=table[:, :2],
    )
    case = dataclasses.replace(case, segment=segment)
    got = case.attend(backend="gpu", interpret=interpret, **options)
    assert_close(got, case.attend(backend="reference", **options), store)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sink_pages_of_a_table_of_their_own(case, interpret):
    check_case(*case, interpret)


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_programs_cross_sequences_behind_sinks(case, interpret, few_programs):
    check_case(*case, interpret)
    assert few_programs
