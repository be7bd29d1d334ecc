"""`Rule` against the plain formula, pair by pair: masks, bounds of a read, pages to keep."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rule import PageLag, Rule

PAGE = 4
ENTRIES = 60
RULES = [
    Rule(),
    Rule(window=1),
    Rule(window=7),
    Rule(window=8, sink_tokens=3),
    Rule(lag=PageLag(PAGE, 0, 2)),
    Rule(lag=PageLag(PAGE, 2)),
    Rule(window=19, lag=PageLag(PAGE, 2)),
    Rule(window=19, sink_tokens=5, lag=PageLag(PAGE, 1, 3)),
    Rule(lag=PageLag(PAGE, 0, 0)),
    Rule(stride=3),
    Rule(window=10, stride=4),
    Rule(window=10, sink_tokens=8, stride=4),
]
by_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def sees(rule: Rule, i: int, g: int) -> bool:
    """The definition, in plain Python: entry `g` stands at position `(g + 1) * stride - 1`."""
    j = (g + 1) * rule.stride - 1
    if j > i:
        return False
    if rule.window is not None and i - j >= rule.window and j >= rule.sink_tokens:
        return False
    if rule.lag is None:
        return True
    distance = i // PAGE - j // PAGE
    return rule.lag.least <= distance and (rule.lag.most is None or distance < rule.lag.most)


def queries():
    """Pairs of the first query's position and the number of queries."""
    return itertools.product((0, 1, 3, 4, 5, 17, 31, 40), (1, 2, 5, 9))


@by_rule
def test_seen_is_the_formula(rule):
    i, g = np.arange(50, dtype=np.int32)[:, None], np.arange(ENTRIES, dtype=np.int32)[None]
    expected = [[sees(rule, a, b) for b in range(ENTRIES)] for a in range(50)]
    np.testing.assert_array_equal(rule.seen(jnp.asarray(i), jnp.asarray(g)), expected)


def test_a_lag_does_not_hide_pinned_entries():
    rule = Rule(window=6, sink_tokens=4, lag=PageLag(PAGE, 0, 1))
    i, g = jnp.int32(30), jnp.arange(31, dtype=jnp.int32)
    np.testing.assert_array_equal(np.flatnonzero(rule.seen(i, g)), [28, 29, 30])
    seen = np.flatnonzero(rule.seen(i, g, pinned=8))
    np.testing.assert_array_equal(seen, [0, 1, 2, 3, 28, 29, 30])


@by_rule
def test_bounds_hold_what_some_query_sees_and_no_more_at_their_ends(rule):
    gaps = rule.window is not None and rule.sink_tokens  # bounds do not leave out such a gap
    for start, count in queries():
        seen = [g for g in range(ENTRIES) if any(sees(rule, start + t, g) for t in range(count))]
        low, high = rule.seen_by_some(*(jnp.int32(x) for x in (start, count, 0, ENTRIES)))
        assert all(low <= g < high for g in seen), (start, count)
        if not gaps and seen:
            assert (low, high) == (seen[0], seen[-1] + 1), (start, count)
        if not seen and not gaps:
            assert low == high, (start, count)


@by_rule
def test_no_queries_see_nothing(rule):
    low, high = rule.seen_by_some(*(jnp.int32(x) for x in (20, 0, 3, 17)))
    assert low == high


@by_rule
def test_every_query_sees_what_lies_in_the_inner_bounds(rule):
    for start, count in queries():
        low, high = rule.seen_by_all(*(jnp.int32(x) for x in (start, count, 0, ENTRIES)))
        for g in range(ENTRIES):
            everyone = all(sees(rule, start + t, g) for t in range(count))
            inside = bool(low <= g < high)
            behind = rule.window is not None and (g + 1) * rule.stride - 1 < rule.sink_tokens
            assert inside == everyone or (everyone and behind), (start, count, g)


@by_rule
def test_a_mask_is_needed_only_where_bounds_do_not_say_all(rule):
    if rule.needs_mask(1):
        assert rule.window is not None and rule.sink_tokens
        return
    for start in range(50):
        low, high = rule.seen_by_some(*(jnp.int32(x) for x in (start, 1, 0, ENTRIES)))
        assert [g for g in range(ENTRIES) if sees(rule, start, g)] == list(range(low, high))


@by_rule
def test_pages_that_are_kept_hold_what_later_queries_see(rule):
    size = PAGE
    for position in range(50):
        first = rule.first_page(jnp.int32(position), size)
        later = [
            g // size
            for g in range(rule.sink_tokens, ENTRIES)
            if any(sees(rule, i, g) for i in range(position, 50))
        ]
        if first is None:
            assert rule.window is None and (rule.lag is None or rule.lag.most is None)
        elif later:
            assert first <= min(later), position


@by_rule
def test_most_pages_is_the_most_at_any_alignment(rule):
    for count in (1, 2, 4, 5, 9):
        used = 0
        for start in range(40):
            seen = [
                g // PAGE
                for g in range(ENTRIES)
                if any(sees(rule, start + t, g) for t in range(count))
                and (g + 1) * rule.stride - 1 >= rule.sink_tokens
            ]
            used = max(used, seen[-1] - seen[0] + 1 if seen else 0)
        most = rule.most_pages(count, PAGE)
        if most is None:
            assert rule.window is None and (rule.lag is None or rule.lag.most is None)
        else:
            assert used <= most <= used + (rule.stride > 1)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(window=0), "^window=0 must be at least 1, or None for all tokens.$"),
        (dict(sink_tokens=-1), "^sink_tokens=-1 must not be negative.$"),
        (dict(stride=0), "^stride=0 must be at least 1.$"),
        (dict(stride=2, lag=PageLag(PAGE)), "^stride=2 must be 1 with a lag: a lag counts "),
    ],
    ids=["window", "sink_tokens", "stride", "stride and lag"],
)
def test_values_that_make_no_sense_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Rule(**values).checked()
