"""A NaN or infinity in one token changes no row that does not see it: plain JAX and the oracle."""

import numpy as np
import pytest

from pallas_kernels.codecs.affine import Int8
from pallas_kernels.codecs.codec import Exact, KVCodec
from pallas_kernels.rule import CAUSAL, PageLag, Rule
from tests.pallas_kernels.paged_attention.isolation import attend_by, check_isolation
from tests.pallas_kernels.paged_attention.paged_cases import make_case

PAGE, TOKENS = 8, 21
RULES = {
    "full": CAUSAL,
    "window": Rule(window=5),
    "window, sinks": Rule(window=5, sink_tokens=3),
    "recent pages": Rule(lag=PageLag(PAGE, most=2)),
    "older pages": Rule(lag=PageLag(PAGE, least=1)),
}


@pytest.fixture(scope="module")
def chunk():
    """As many sequences as positions, so that each is poisoned at another one."""
    shape = dict(page_size=PAGE, kv_heads=2, group=2, head_dim=16)
    return make_case("float32", lengths=(TOKENS,) * TOKENS, q_lens=(13,) * TOKENS, **shape)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_every_position_of_a_chunk(chunk, rule, backend):
    check_isolation(chunk, attend_by(rule=rule, backend=backend), range(TOKENS), rule)


def test_later_blocks_repair_only_themselves():
    """Of a long segment only one block holds the token; the others take the usual path."""
    shape = dict(page_size=PAGE, kv_heads=1, group=1, head_dim=16)
    case = make_case("float32", lengths=(300, 300), q_lens=(9, 9), **shape)
    rule = Rule(window=200)
    for positions in ((92, 297), (100, 299), (95, 292)):
        check_isolation(case, attend_by(rule=rule, backend="xla"), positions, rule)


def test_exact_values_beside_coded_keys():
    """The levels of such values lie page by page; what is not finite is a level, not a factor."""
    codec = KVCodec(name="own", key=Int8(), value=Exact("float32"))
    shape = dict(page_size=PAGE, kv_heads=1, group=1, head_dim=16)
    case = make_case(codec, lengths=(TOKENS,), q_lens=(13,), **shape)
    clean = case.attend(backend="xla")
    page = int(case.segment.table[0, 15 // PAGE])
    pool = case.pages.arrays["v_codes"]
    case.pages.arrays["v_codes"] = pool.at[1, page, :, 15 % PAGE].set(np.nan)
    out, lse = case.attend(backend="xla")
    np.testing.assert_array_equal(out[0, :7], clean.out[0, :7])  # positions 8 to 14
    assert np.isnan(out[0, 7:]).all()
    np.testing.assert_array_equal(lse, clean.lse)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_one_query_passes_over_the_gap_behind_sinks(backend):
    positions = (1, 2, 9, 16, 17)  # sink, gap, gap, gap, window
    case = make_case("float32", lengths=(20,) * 5, page_size=PAGE, head_dim=16)
    rule = Rule(window=3, sink_tokens=2)
    check_isolation(case, attend_by(rule=rule, backend=backend), positions, rule)
