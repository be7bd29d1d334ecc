"""Whether prompts fit is told by arithmetic, exactly as the cache itself then finds it."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig, Keep, KVCache, LayerSpec, Sizes
from jaxkv.codecs import get_codec
from jaxkv.prompts_fit import prompts_fit
from jaxkv.sizes import chunks
from tests.jaxkv.plain_model import plain_model

PAGE, BATCH, CHUNK, MAX_TOKENS, STEPS = 4, 3, 12, 80, 64
FULL = LayerSpec(kv_heads=1, head_dim=8, dtype="float32")
WINDOW = dataclasses.replace(FULL, window=10)
SINKS = dataclasses.replace(FULL, window=13, sink_tokens=5)


def coded(recent_pages, codec_sinks=0, **options):
    codec = dataclasses.replace(
        get_codec("int8"), recent_pages=recent_pages, sink_tokens=codec_sinks
    )
    return dataclasses.replace(FULL, codec=codec, **options)


LAYERS = {
    "full": (FULL,),
    "window": (WINDOW,),
    "sinks": (SINKS,),
    "mixed": (FULL, SINKS, WINDOW, FULL),
    "coded": (coded(2, codec_sinks=5),),
    "coded from the first token": (coded(0),),
    "coded with exact sinks alone": (coded(0, codec_sinks=3),),
    "coded behind a window": (coded(1, window=17, sink_tokens=3), FULL),
}


def make_config(layers, pages=None):
    return CacheConfig(
        layers=layers,
        batch=BATCH,
        max_tokens=MAX_TOKENS,
        max_new_tokens=CHUNK,
        page_size=PAGE,
        pages=pages,
    ).checked()


@jax.jit
def read_prompts(cache, targets, plan):
    """Reads up to `targets` in chunks, as `generate` does; returns the cache after each's end."""

    def goes_on(carry):
        step, cache, advanced = carry
        return advanced & jnp.any(cache.lengths < targets)

    def body(carry):
        step, cache, _ = carry
        chunk = jnp.where(plan[step] > 0, plan[step], plan[0])
        cache = cache.prepare(jnp.clip(targets - cache.lengths, 0, chunk))
        advanced = jnp.any(cache.pending > 0)
        return step + 1, cache.commit(cache.pending), advanced

    return jax.lax.while_loop(goes_on, body, (jnp.int32(0), cache, jnp.bool_(True)))[1]


def plan_of(left):
    plan = list(chunks(int(max(left)), CHUNK))
    return jnp.asarray(plan + [0] * (STEPS - len(plan)), jnp.int32)


def with_pages(cache, config):
    """The cache as if its pools had the pages of `config`; None if it uses more already."""
    stores = []
    for store, spec in zip(cache.stores, config.stores, strict=True):
        free = store.pool.free_pages - (store.spec.pages - spec.pages)
        if free < 0:
            return None
        pool = dataclasses.replace(store.pool, free_pages=free)
        stores.append(dataclasses.replace(store, pool=pool))
    return dataclasses.replace(cache, stores=tuple(stores))


@pytest.mark.parametrize("name", LAYERS)
def test_it_says_what_the_cache_finds(name):
    rng = np.random.default_rng(3)
    empty = KVCache.create(make_config(LAYERS[name]))
    enough = sum(-(-MAX_TOKENS // PAGE) for _ in range(BATCH))
    found = []
    while len(found) < 40:
        lengths = rng.integers(1, MAX_TOKENS, BATCH)
        if rng.random() < 0.2:
            lengths[1] = 1
        cached = np.zeros(BATCH, int)
        if len(found) % 2:
            cached = np.where(rng.random(BATCH) < 0.6, rng.integers(0, lengths), 0)
        most = rng.integers(3, enough) if name == "full" else rng.integers(3, enough // 2)
        config = make_config(LAYERS[name], pages=int(most))
        began = read_prompts(empty, jnp.asarray(cached, jnp.int32), plan_of(cached))
        assert began.lengths.tolist() == cached.tolist()
        tight = with_pages(began, config)
        if tight is None:
            continue
        left = jnp.asarray(lengths - 1, jnp.int32)
        ended = read_prompts(tight, left, plan_of(lengths - 1 - cached))
        fits = ended.lengths.tolist() == left.tolist()
        reason = prompts_fit(config, lengths.tolist(), cached=cached.tolist())
        assert (reason is None) == fits, (reason, lengths, cached, most)
        if reason is not None:
            assert f"full after {int(ended.lengths.sum())} tokens" in reason
            assert "\n" not in reason
        found.append(fits)
    assert 4 < sum(found) < 36


def test_windows_give_pages_back_while_a_prompt_is_read():
    short = make_config((WINDOW,), pages=8)
    assert prompts_fit(short, [80, 1, 1]) is None
    reason = prompts_fit(make_config((FULL,), pages=8), [80, 1, 1])
    assert reason == (
        "prompts of 82 tokens do not fit pools of [7] pages of 4 tokens, which are full after 24 "
        "tokens: raise pages or use fewer prompts."
    )


def test_a_prompt_beyond_the_tables_does_not_fit():
    config = make_config((FULL,))
    assert prompts_fit(config, [MAX_TOKENS, 1, 1]) is None
    reason = prompts_fit(config, [MAX_TOKENS + 1, 1, 1])
    assert reason == "a prompt of 81 tokens does not fit max_tokens=80."


def test_lengths_are_one_per_sequence():
    with pytest.raises(ValueError, match="one entry for each of 3"):
        prompts_fit(make_config((FULL,)), [4])


def test_generation_says_so_before_it_allocates_or_compiles(monkeypatch):
    model = plain_model()
    first = jaxkv.generate(model, [[5, 9]], max_tokens=2, sizes=Sizes(page_size=4, pages=9))

    def fails(*_, **__):
        raise AssertionError("compiled or allocated")

    monkeypatch.setattr(KVCache, "create", fails)
    monkeypatch.setattr(importlib.import_module("jaxkv.stream"), "prefill_chunk", fails)
    monkeypatch.setattr(importlib.import_module("jaxkv.filled_cache"), "_free", fails)
    with pytest.raises(ValueError, match="do not fit pools of .2, 2. pages"):
        jaxkv.stream(model, [[1] * 40], sizes=Sizes(page_size=8, pages=3))
    with pytest.raises(ValueError, match="do not fit pools of .8, 8. pages"):
        jaxkv.stream(model, [first.tokens[0] * 30], cache=first.cache)
    with pytest.raises(AssertionError, match="allocated"):  # a window gives pages back in time
        narrow = Sizes(page_size=8, pages=4, chunk=8)
        jaxkv.stream(model, [[1] * 40], sizes=narrow, keep=Keep(window=8))
