"""Which tokens each sampling rule can draw, against its definition in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.sampling import Sampling, draw_keys, sample

VOCAB = 11


def logits(seed=0, rows=1):
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def drawn(x, sampling, draws=600):
    """Set of tokens that `draws` keys give for the first row of `x`."""
    keys = jax.random.split(jax.random.key(3), draws)
    rows = jnp.broadcast_to(jnp.asarray(x[:1]), (draws, VOCAB))
    return set(np.asarray(sample(rows, sampling.checked(), keys)).tolist())


def by_probability(x, temperature=1.0):
    p = np.exp(x[0] / temperature - np.max(x[0] / temperature))
    return np.argsort(-p), p / p.sum()


def test_greedy_takes_the_largest_and_needs_no_key():
    x = logits(rows=4)
    keys = jax.random.split(jax.random.key(0), 4)
    for sampling in (Sampling(), Sampling(temperature=0.0, top_k=3)):
        got = sample(jnp.asarray(x), sampling.checked(), keys)
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
    [("temperature", -0.1), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0),
     ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2.0)],
)  # fmt: skip
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}"):
        Sampling(**{"temperature": 1.0, field: value}).checked()


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
    compiled = jax.jit(sample)
    for temperature, top_p in ((0.7, 0.9), (1.3, 0.5)):
        compiled(x, Sampling(temperature=temperature, top_p=top_p), keys)
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
