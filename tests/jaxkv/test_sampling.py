"""Which tokens each rule can draw and how penalties change logits, by definitions in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.draw import adjust, draw, draw_keys, rules_of
from jaxkv.sampling import Sampling

VOCAB = 11


def logits(seed=0, rows=1):
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def sample(x, sampling, keys):
    """One draw per row of `x`, all by the same rules."""
    return draw(jnp.asarray(x), rules_of([sampling.checked()] * len(x)), keys)


def drawn(x, sampling, draws=600):
    """Set of tokens that `draws` keys give for the first row of `x`."""
    keys = jax.random.split(jax.random.key(3), draws)
    rows = jnp.broadcast_to(jnp.asarray(x[:1]), (draws, VOCAB))
    return set(np.asarray(sample(rows, sampling, keys)).tolist())


def by_probability(x, temperature=1.0):
    p = np.exp(x[0] / temperature - np.max(x[0] / temperature))
    return np.argsort(-p), p / p.sum()


def test_greedy_takes_the_largest_and_needs_no_key():
    x = logits(rows=4)
    keys = jax.random.split(jax.random.key(0), 4)
    for sampling in (Sampling(), Sampling(temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)):
        got = sample(x, sampling, keys)
        np.testing.assert_array_equal(got, x.argmax(-1))


def test_a_low_temperature_is_nearly_greedy():
    x = logits()
    assert drawn(x, Sampling(temperature=0.01)) == {int(x.argmax())}


@pytest.mark.parametrize("k", [1, 3, VOCAB, 100])
def test_top_k_keeps_the_k_likeliest(k):
    order, _ = by_probability(logits())
    assert drawn(logits(), Sampling(temperature=4.0, top_k=k)) == set(order[:k].tolist())


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8, 1.0])
def test_top_p_keeps_the_fewest_that_reach_it(top_p):
    order, p = by_probability(logits(), 4.0)
    count = int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-6)) + 1
    assert drawn(logits(), Sampling(temperature=4.0, top_p=top_p)) == set(order[:count].tolist())


@pytest.mark.parametrize("min_p", [0.0, 0.3, 1.0])
def test_min_p_is_relative_to_the_best(min_p):
    order, p = by_probability(logits(), 4.0)
    kept = {int(t) for t in order if p[t] >= min_p * p.max()}
    assert drawn(logits(), Sampling(temperature=4.0, min_p=min_p)) == kept


def test_top_p_counts_what_top_k_left():
    order, p = by_probability(logits(), 4.0)
    p = p[order[:4]] / p[order[:4]].sum()
    count = int(np.searchsorted(np.cumsum(p), 0.6)) + 1
    got = drawn(logits(), Sampling(temperature=4.0, top_k=4, top_p=0.6))
    assert got == set(order[:count].tolist())


def test_frequencies_follow_the_softmax():
    x, draws = logits(), 20000
    _, p = by_probability(x)
    keys = jax.random.split(jax.random.key(1), draws)
    rows = jnp.broadcast_to(jnp.asarray(x), (draws, VOCAB))
    got = np.bincount(np.asarray(sample(rows, Sampling(temperature=1.0), keys)), minlength=VOCAB)
    np.testing.assert_allclose(got / draws, p, atol=5 * np.sqrt(0.25 / draws))


def test_a_row_does_not_depend_on_its_neighbours():
    x = logits(rows=5)
    keys = jax.random.split(jax.random.key(2), 5)
    sampling = Sampling(temperature=2.0, top_k=5, top_p=0.9)
    together = sample(jnp.asarray(x), sampling, keys)
    alone = [sample(jnp.asarray(x[i : i + 1]), sampling, keys[i : i + 1])[0] for i in range(5)]
    np.testing.assert_array_equal(together, jnp.stack(alone))


@pytest.mark.parametrize(
    "field, value",
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"),
     ("temperature", True), ("top_k", 0), ("top_k", 2**31), ("top_k", 1.5), ("top_p", 0.0),
     ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2.0), ("repetition_penalty", 0.0),
     ("presence_penalty", float("inf")), ("frequency_penalty", None), ("min_tokens", -1),
     ("logprobs", -1), ("logprobs", True), ("prompt_logprobs", 1), ("hook", "no function")],
)  # fmt: skip
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value!r} must"):
        Sampling(**{"temperature": 1.0, field: value}).checked()


@pytest.mark.parametrize("rule", [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_a_rule_without_a_temperature_draws_at_temperature_1(rule):
    assert Sampling(**rule).checked().temperature == 1
    assert drawn(logits(), Sampling(**rule)) == drawn(logits(), Sampling(temperature=1, **rule))
    assert len(drawn(logits(), Sampling(**rule))) > 1
    assert len(drawn(logits(), Sampling(temperature=0, **rule))) == 1
    assert Sampling().checked().temperature == Sampling(min_tokens=3).checked().temperature == 0


MIXED = [
    Sampling(temperature=0),
    Sampling(temperature=9.0),
    Sampling(temperature=9.0, top_k=3),
    Sampling(top_p=0.4),
    Sampling(temperature=3.0, min_p=0.5),
    Sampling(temperature=2.0, top_k=6, top_p=0.9, min_p=0.01),
]


def test_rows_of_different_rules_draw_what_each_draws_alone():
    x = jnp.asarray(logits(rows=len(MIXED)))
    checked = [sampling.checked() for sampling in MIXED]
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), len(MIXED))
        together = draw(x, rules_of(checked), keys)
        alone = [
            int(draw(x[n : n + 1], rules_of([rules]), keys[n : n + 1])[0])
            for n, rules in enumerate(checked)
        ]
        assert together.tolist() == alone


def test_penalties_are_those_of_their_formulas():
    x = logits(rows=3)
    tokens = np.int32([[1, 2, 2, 7, 7, 7, -1], [3, 3, 4, 4, 5, -1, -1], [9, 8, -1, -1, -1, -1, -1]])
    prompt_lens, lens = np.int32([3, 1, 2]), np.int32([6, 5, 2])
    samplings = [
        Sampling(repetition_penalty=1.7, presence_penalty=0.3, frequency_penalty=-0.2),
        Sampling(frequency_penalty=0.9),
        Sampling(repetition_penalty=0.5, presence_penalty=2.0),
    ]
    want = x.copy()
    for row, one in enumerate(samplings):
        known = tokens[row, : lens[row]].tolist()
        answer = known[prompt_lens[row] :]
        for token in set(known):
            value, penalty = want[row, token], one.repetition_penalty
            want[row, token] = value / penalty if value > 0 else value * penalty
        for token in set(answer):
            want[row, token] -= one.presence_penalty + one.frequency_penalty * answer.count(token)
    none = jnp.full((3, 1), -1, jnp.int32)
    got = adjust(jnp.asarray(x), rules_of(samplings), tokens, prompt_lens, lens, none)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.abs(want - x).max() > 1


def test_tokens_that_end_a_request_can_not_be_drawn_too_early():
    x, tokens = logits(rows=3), np.full((3, 4), 1, np.int32)
    rules = rules_of([Sampling(min_tokens=2), Sampling(min_tokens=1), Sampling()])
    stops, two = np.int32([[4, 6], [4, -1], [4, 6]]), np.full(3, 2, np.int32)
    got = np.asarray(adjust(jnp.asarray(x), rules, tokens, two, two + np.int32([1, 0, 0]), stops))
    want = x.copy()
    want[0, [4, 6]] = want[1, 4] = -np.inf
    np.testing.assert_array_equal(got, want)


def test_a_hook_sees_logits_and_tokens_and_must_keep_their_shape():
    x, tokens = logits(rows=2), np.int32([[3, 1, -1], [2, 0, 5]])
    two = np.full(2, 2, np.int32)
    none = np.full((2, 1), -1, np.int32)

    def never_again(logits, tokens):
        return jnp.where(jax.nn.one_hot(tokens, VOCAB).any(1), -jnp.inf, logits)

    got = adjust(jnp.asarray(x), rules_of([Sampling(hook=never_again)] * 2), tokens, two, two, none)
    want = x.copy()
    want[0, [3, 1]] = want[1, [2, 0, 5]] = -np.inf
    np.testing.assert_array_equal(got, want)
    bad = rules_of([Sampling(hook=lambda logits, tokens: logits[0])] * 2)
    with pytest.raises(ValueError, match="hook must return logits"):
        adjust(jnp.asarray(x), bad, tokens, two, two, none)
    with pytest.raises(ValueError, match="names 2 hooks: all requests must share one"):
        rules_of([Sampling(hook=never_again), Sampling()])


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-40])  # the last two overflow a float32
@pytest.mark.parametrize("rules", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}])
def test_the_limit_of_low_temperatures_is_greedy(temperature, rules):
    x = logits(rows=50)
    keys = jax.random.split(jax.random.key(0), 50)
    got = sample(jnp.asarray(x), Sampling(temperature=temperature, **rules).checked(), keys)
    np.testing.assert_array_equal(got, x.argmax(-1))


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_all_rules_together(temperature):
    x = logits(seed=8)
    order, p = by_probability(x, temperature)
    order = order[:8]
    p = p[order] / p[order].sum()
    count = int(np.searchsorted(np.cumsum(p), 0.9)) + 1
    kept = {int(t) for t, chance in zip(order[:count], p[:count], strict=True) if chance > p[0] / 3}
    assert 1 < len(kept) < count < 8
    rules = Sampling(temperature=temperature, top_k=8, top_p=0.9, min_p=1 / 3)
    assert drawn(x, rules, draws=3000) == kept


@pytest.mark.parametrize("rules", [{}, {"top_k": 5}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_masked_tokens_are_never_drawn(rules):
    x = np.full((1, VOCAB), -np.inf, np.float32)
    x[0, [3, 8]] = 0.0
    assert drawn(x, Sampling(temperature=1.0, **rules)) == {3, 8}


def test_numbers_change_without_compiling_again():
    x, keys = jnp.asarray(logits()), jax.random.split(jax.random.key(0), 1)
    compiled = jax.jit(draw)
    for temperature, top_p in ((0.7, 0.9), (1.3, 0.5)):
        compiled(x, rules_of([Sampling(temperature=temperature, top_p=top_p)]), keys)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("default", ["threefry2x32", "rbg"])
def test_draws_follow_seed_and_count_in_any_row_and_batch(default):
    seeds, counts = np.uint32([3, 3, 4, 2**32 - 1, 3]), np.int32([0, 1, 0, 7, 0])
    with jax.default_prng_impl(default):
        hot, x = Sampling(temperature=9.0), jnp.broadcast_to(jnp.asarray(logits()), (5, VOCAB))
        keys = draw_keys(jnp.asarray(seeds), jnp.asarray(counts))
        together = np.asarray(sample(x, hot, keys))
        alone = [
            int(sample(x[:1], hot, draw_keys(jnp.asarray(seeds[n : n + 1]), jnp.asarray([c])))[0])
            for n, c in enumerate(counts)
        ]
    assert together.tolist() == alone
    data = np.asarray(jax.random.key_data(keys))
    assert (data[0] == data[4]).all()
    assert len({tuple(row) for row in data}) == 4
