"""Chunks of prompts by the GPU kernel, block by block, equal the dense formula."""

import pytest

from pallas_kernels.rule import PageLag, Rule
from tests.pallas_kernels.paged_attention.triton.kernel_cases import assert_close, make_case

# More rows than one program takes, cut into blocks of 8 (CHUNK) or 42 (LONG) tokens; the last block
# is partly or all padding.
CHUNK = dict(lengths=(20, 49, 130, 75), q_lens=(20, 17, 0, 1), group=16, kv_heads=1)
LONG = dict(lengths=(50, 131), q_lens=(50, 45), group=3)
CASES = {
    "full": ("bfloat16", CHUNK, dict()),
    "window": ("bfloat16", LONG, dict(rule=Rule(window=37))),
    "window, sinks": ("float16", CHUNK, dict(rule=Rule(window=27, sink_tokens=20), soft_cap=1.5)),
    "recent pages": ("bfloat16", LONG, dict(rule=Rule(lag=PageLag(16, most=2)))),
    "tq4": ("tq4", LONG | dict(head_dim=128), dict(rule=Rule(lag=PageLag(16, least=1)))),
}
# Loading does not depend on which sequence a block belongs to, so each of the cases added here runs
# in one of the two tests only.
WHOLE = CASES | {
    "head_dim 256": ("bfloat16", CHUNK | dict(head_dim=256), dict()),
    "fp8_e4m3": ("fp8_e4m3", LONG, dict()),
    "tq3": ("tq3", CHUNK, dict(rule=Rule(window=40))),
}
SHARED = CASES | {
    "int8": ("int8", CHUNK, dict(rule=Rule(window=27))),
    "k8v4": ("k8v4", CHUNK, dict()),
}


def check_case(store, shape, options, interpret):
    case = make_case(store, **shape)
    got = case.attend(backend="gpu", interpret=interpret, **options)
    assert_close(got, case.dense(**options), store)


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_a_program_takes_a_block(case, interpret):
    check_case(*case, interpret)


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_programs_cross_blocks(case, interpret, few_programs):
    check_case(*case, interpret)
    assert few_programs


def test_one_token_blocks(interpret):
    """With 70 query heads per kv head, a block of 128 rows has room for one token only."""
    shape = dict(lengths=(3, 20), q_lens=(3, 1), group=70, kv_heads=1)
    check_case("bfloat16", shape, dict(rule=Rule(window=9)), interpret)
