"""The GPU kernel on exact pages equals the dense formula, for a few query tokens."""

import dataclasses

import jax.numpy as jnp
import pytest

from pallas_kernels.rule import PageLag, Rule
from pallas_kernels.segment import Part, add_learned_sink
from tests.pallas_kernels.paged_attention.triton.kernel_cases import (
    EDGES,
    SMALL,
    TRANSPOSED,
    assert_close,
    make_case,
)

CONFIGS = {"flat": SMALL, "edges": EDGES, "transposed": TRANSPOSED}
# One batch, and so one compiled program, holds whole sequences, segments that begin within a page,
# and rings that have wrapped.
LENGTHS = dict(lengths=(1, 33, 64, 150, 61, 200, 90), kv_start=(0, 0, 0, 0, 21, 121, 70), width=11)
SEGMENTS = {"decode": LENGTHS, "verify": LENGTHS | dict(q_lens=(1, 3, 0, 4, 1, 3, 0))}
MASKS = [
    dict(),
    dict(rule=Rule(window=20)),
    dict(rule=Rule(window=40, sink_tokens=5)),
    dict(rule=Rule(lag=PageLag(16, least=1))),
    dict(rule=Rule(lag=PageLag(16, most=2)), soft_cap=1.5),
]
# Each rule with each number of query tokens; the tile sizes take turns.
CASES = [
    (segments, options, list(CONFIGS)[(i + j) % len(CONFIGS)])
    for i, segments in enumerate(SEGMENTS)
    for j, options in enumerate(MASKS)
]


@pytest.mark.both_pythons
@pytest.mark.parametrize("segments, options, config", CASES, ids=str)
def test_exact_pages_equal_dense(segments, options, config, interpret):
    case = make_case(**SEGMENTS[segments])
    got = case.attend_kernel(interpret=interpret, config=CONFIGS[config], **options)
    assert_close(got, case.dense(**options))


@pytest.mark.slow
def test_many_rows(interpret):
    """A group of 7 with several query tokens: more rows than one warp takes."""
    for store in ("bfloat16", "4bit_nc"):
        case = make_case(store, lengths=(4, 70), q_lens=(4, 3), group=7, kv_heads=1)
        assert_close(case.attend_kernel(interpret=interpret), case.dense(), store)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_float_types(dtype, interpret):
    case = make_case(dtype)
    assert_close(case.attend_kernel(interpret=interpret, config=EDGES), case.dense(), dtype)


SHAPES = [
    dict(head_dim=80, group=1),
    dict(head_dim=96, group=7, page_size=32),
    dict(head_dim=128, group=4, page_size=64),
    dict(head_dim=192, group=2, page_size=128),
    dict(head_dim=256, group=16, kv_heads=1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, interpret):
    case = make_case(lengths=(1, 70, 129), **shape)
    assert_close(case.attend_kernel(interpret=interpret, config=EDGES), case.dense())


# Learned sinks are merged after the kernel; the output must keep its type.
@pytest.mark.parametrize("tokens, dtype", [(1, "bfloat16"), (9, "float32")], ids=["few", "chunk"])
def test_learned_sinks_and_the_type_of_the_output(tokens, dtype, interpret):
    case = make_case(lengths=(20, 49), q_lens=(tokens, 1))
    out, lse = case.attend(backend="gpu", interpret=interpret, out_dtype=jnp.dtype(dtype))
    assert out.dtype == dtype
    assert_close((out.astype(jnp.float32), lse), case.dense())
    sinks = jnp.arange(out.shape[2], dtype=jnp.float32) / 3 - 1
    part = add_learned_sink(Part(out, lse), sinks)
    assert part.out.dtype == jnp.float32
    assert_close(part, case.dense(sink_logits=sinks))


def test_entries_that_stand_for_several_tokens(interpret):
    """Keys are entries of three tokens, complete with the last of them; queries are tokens."""
    case, rule = make_case(lengths=(20, 49), q_lens=(3, 2)), Rule(window=70, stride=3)
    queries = dataclasses.replace(case.queries, start=3 * case.queries.start + 1)
    case = dataclasses.replace(case, queries=queries)
    got = case.attend_kernel(rule, interpret=interpret, config=EDGES)
    assert_close(got, case.dense(rule))
