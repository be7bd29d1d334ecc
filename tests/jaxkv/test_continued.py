"""A cache that outlives a call: the next one feeds only new tokens and answers as a cold one."""

import dataclasses

import numpy as np
import pytest

import jaxkv
from jaxkv import Keep, Sizes
from jaxkv.grow import grow
from jaxkv.sizes import LEAST_TOKENS, chunks, pool_pages, table_tokens
from jaxkv.steps import decode_block, prefill_chunk
from tests.jaxkv.plain_model import plain_model

pytestmark = pytest.mark.both_pythons

PROMPTS = [[5, 9, 31, 3], [17], list(range(2, 25))]
SIZES = Sizes(page_size=4, chunk=8, block=3)
MORE = [[1, 2], [], list(range(30, 39))]


@pytest.fixture(scope="module")
def model():
    return plain_model()


def turn(prompts, result):
    """The prompts, their answers, and what comes next."""
    said = zip(prompts, result.tokens, MORE, strict=True)
    return [prompt + answer + more for prompt, answer, more in said]


@pytest.mark.parametrize(
    "keep",
    [
        Keep(),
        Keep(window=5, sink_tokens=2),
        Keep(codec="tq4", keep_first=1),
        Keep(codec="int8", window=9, sink_tokens=3),
    ],
)
def test_the_next_turn_feeds_new_tokens_and_answers_as_a_cold_run(model, keep):
    options = dict(keep=keep, max_tokens=10, sizes=SIZES)
    prompts, cache = PROMPTS, None
    for _ in range(3):
        cold = jaxkv.generate(model, prompts, **options)
        result = jaxkv.generate(model, prompts, cache=cache, **options)
        assert result.tokens == cold.tokens
        held = [0] * 3 if cache is None else [len(tokens) for tokens in cache.tokens]
        assert result.cached_tokens == held
        lengths = np.asarray(result.cache.kv.lengths).tolist()
        assert lengths == [len(tokens) for tokens in result.cache.tokens]
        prompts, cache = turn(prompts, result), result.cache
        for prompt, held in zip(prompts, cache.tokens, strict=True):
            assert tuple(prompt[: len(held)]) == held


def test_a_prompt_that_does_not_continue_starts_anew(model):
    first = jaxkv.generate(model, PROMPTS, max_tokens=10, sizes=SIZES)
    # Another beginning; all that is held and nothing more; a continuation.
    prompts = [[6, *PROMPTS[0], 4], list(first.cache.tokens[1]), turn(PROMPTS, first)[2]]
    result = jaxkv.generate(model, prompts, max_tokens=10, cache=first.cache)
    assert result.cached_tokens == [0, 0, len(prompts[2]) - 10]
    assert result.tokens == jaxkv.generate(model, prompts, max_tokens=10, sizes=SIZES).tokens
    assert result.cache.sizes == SIZES


def test_a_cache_grows_with_its_sequences(model, monkeypatch):
    monkeypatch.setattr("jaxkv.sizes.LEAST_TOKENS", 16)
    # Codes, in one layer without a window, in the other with one and with sinks.
    options = dict(keep=Keep(codec="int8", sink_tokens=2), max_tokens=10, sizes=SIZES)
    first = jaxkv.generate(model, PROMPTS, **options)
    prompts = turn(PROMPTS, first)
    prompts[0] += [7] * 60
    result = jaxkv.generate(model, prompts, cache=first.cache, **options)
    assert result.cached_tokens == [13, 10, 32]
    assert result.tokens == jaxkv.generate(model, prompts, **options).tokens
    assert (first.config.max_tokens, result.config.max_tokens) == (64, 128)
    assert first.config.pages < result.config.pages


def test_growing_keeps_what_it_can_not_see_and_refuses_the_rest(model):
    config = jaxkv.CacheConfig(
        layers=model.layer_specs(Keep()), batch=2, max_tokens=16, page_size=4
    ).checked()
    cache = jaxkv.KVCache.create(config)
    with pytest.raises(ValueError, match="can't grow .* only in tokens and pages"):
        grow(cache, dataclasses.replace(config, batch=3))
    with pytest.raises(ValueError, match="can't shrink"):
        grow(cache, dataclasses.replace(config, max_tokens=8))


def test_a_cache_serves_once_and_only_its_own_kind(model):
    first = jaxkv.generate(model, PROMPTS, max_tokens=4, sizes=SIZES)
    prompts = turn(PROMPTS, first)
    other = plain_model(heads=3)
    for options, message in [
        (dict(prompts=prompts[:2]), "cache holds 3 sequences, and prompts has 2"),
        (dict(keep=Keep(window=3)), r"keep=Keep\(.*must be the cache's"),
        (dict(sizes=Sizes()), r"sizes=Sizes\(.*must be the cache's"),
        (dict(model=other), "cache belongs to a model with other layers"),
        (dict(key_means=[]), "key_means must be left out"),
    ]:
        call = dict(model=model, prompts=prompts, cache=first.cache, max_tokens=4) | options
        with pytest.raises(ValueError, match=message):
            jaxkv.generate(call.pop("model"), call.pop("prompts"), **call)
    jaxkv.generate(model, prompts, cache=first.cache, max_tokens=4)  # a refused call took nothing
    with pytest.raises(ValueError, match="cache was taken over by an earlier call"):
        jaxkv.generate(model, prompts, cache=first.cache, max_tokens=4)


def test_sequences_that_share_capped_pages_give_them_back(model):
    sizes = dataclasses.replace(SIZES, pages=12)
    first = jaxkv.generate(model, PROMPTS, max_tokens=4, sizes=sizes)
    assert first.stop_reasons == ["length"] * 3
    assert first.cache.tokens == ((), (), ())
    result = jaxkv.generate(model, PROMPTS, max_tokens=4, cache=first.cache)
    assert (result.cached_tokens, result.tokens) == ([0, 0, 0], first.tokens)


def test_three_programs_serve_prompts_of_1_to_4000_tokens(model):
    before = prefill_chunk._cache_size(), decode_block._cache_size()
    rng = np.random.default_rng(0)
    for length in (1, 2, 40, 64, 65, 129, 200, 256, 257, 420, 1000, 3999):
        prompt = rng.integers(0, 40, length).tolist()
        jaxkv.generate(model, [prompt], max_tokens=32, stop_ids=(3, 4)[: length % 3])
    after = prefill_chunk._cache_size(), decode_block._cache_size()
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 1]


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 128, 129, 256, 257, 1000])
def test_chunks_read_every_token_in_two_sizes(tokens):
    plan = list(chunks(tokens, 256))
    assert set(plan) <= {64, 256}
    assert sum(plan) >= tokens > sum(plan[:-1]) or not plan
    assert sum(plan) < max(2 * tokens, 65)


def test_tables_and_pools_have_few_sizes_and_little_waste():
    assert table_tokens([1, 7]) == table_tokens([LEAST_TOKENS]) == LEAST_TOKENS
    assert table_tokens([LEAST_TOKENS + 1]) == 2 * LEAST_TOKENS
    assert pool_pages([1], 64) == pool_pages([4096], 64) == 65
    needed = [sum(-(-n // 64) for n in totals) for totals in ([9000] * 64, [70_000], [4097, 5])]
    pools = [pool_pages(totals, 64) - 1 for totals in ([9000] * 64, [70_000], [4097, 5])]
    assert all(need <= pool <= need * 17 / 16 + 1 for need, pool in zip(needed, pools, strict=True))
    assert len({pool_pages([n], 64) for n in range(4097, 8193, 13)}) == 16
