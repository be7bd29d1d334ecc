"""Merging parts of a softmax by their log-sum-exp gives the softmax of the whole."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, add_learned_sink, merge
from tests.helpers import TOLERANCE

LOG = np.log
ATOL = TOLERANCE["float32"]


def f32(values):
    return jnp.asarray(values, jnp.float32)


def make_part(seed, *, rows=(3, 5), head_dim=4):
    rng = np.random.default_rng(seed)
    out = f32(rng.standard_normal((*rows, head_dim)))
    return Part(out, f32(3 * rng.standard_normal(rows)))


def empty_part(rows=(3, 5), head_dim=4):
    return Part(jnp.zeros((*rows, head_dim)), jnp.full(rows, -jnp.inf))


def assert_parts_close(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=ATOL, rtol=ATOL)


def assert_parts_equal(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_merge_of_two_rows_by_hand():
    out, lse = merge(
        Part(f32([[1, 0], [2, 4]]), f32(LOG([1, 3]))), Part(f32([[0, 1], [6, 0]]), f32(LOG([1, 1])))
    )
    np.testing.assert_allclose(out, [[0.5, 0.5], [3, 3]], rtol=1e-6)
    np.testing.assert_allclose(lse, LOG([2, 4]), rtol=1e-6)


def test_learned_sink_by_hand():
    out, lse = add_learned_sink(Part(f32([[1, 0], [2, 4]]), f32(LOG([1, 3]))), f32(LOG([1, 1])))
    np.testing.assert_allclose(out, [[0.5, 0], [1.5, 3]], rtol=1e-6)
    np.testing.assert_allclose(lse, LOG([2, 4]), rtol=1e-6)


def test_empty_parts_merge_to_nothing():
    out, lse = merge(empty_part(), empty_part())
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_empty_part_changes_nothing():
    part = make_part(0)
    assert_parts_equal(merge(part, empty_part()), part)
    assert_parts_equal(merge(empty_part(), part), part)


def test_sink_of_minus_infinity_is_no_sink():
    part = make_part(1)
    assert_parts_equal(add_learned_sink(part, jnp.full(5, -jnp.inf)), part)


def test_sink_alone_gives_zero_and_its_logit():
    sink = f32([0.5, -1, 2, 0, -jnp.inf])
    out, lse = add_learned_sink(empty_part(), sink)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, np.broadcast_to(sink, (3, 5)))


def test_merge_is_associative_and_commutative():
    a, b, c = (make_part(seed) for seed in range(3))
    left = merge(merge(a, b), c)
    assert_parts_close(left, merge(a, merge(b, c)))
    assert_parts_close(left, merge(c, merge(b, a)))


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_neither_overflow_nor_vanish(shift):
    (out_a, lse_a), (out_b, lse_b) = make_part(3), make_part(4)
    out, lse = merge(Part(out_a, lse_a + shift), Part(out_b, lse_b + shift))
    expected, _ = merge(Part(out_a, lse_a), Part(out_b, lse_b))
    np.testing.assert_allclose(out, expected, atol=1e-2)  # lse near 1e4 has a step of 1e-3
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("border", [0, 1, 7, 12])
def test_merge_of_split_keys_equals_the_whole(border):
    rng = np.random.default_rng(5)
    q = f32(rng.standard_normal((2, 5, 6, 8)))
    k, v = (f32(rng.standard_normal((2, 12, 3, 8))) for _ in range(2))
    position = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    attend = functools.partial(
        dense_attention, q, k, v, position[:, 7:], scale=0.3, rule=Rule(window=9)
    )
    parts = [
        attend(jnp.where(keep, position, -1)) for keep in (position < border, position >= border)
    ]
    sinks = f32(rng.standard_normal(6))
    assert_parts_close(add_learned_sink(merge(*parts), sinks), attend(position, sink_logits=sinks))
