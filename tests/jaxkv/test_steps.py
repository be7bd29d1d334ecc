"""The jitted steps: each row has its own limits, and a block runs without the host."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.draw import rules_of
from jaxkv.steps import (
    LENGTH,
    NO_TOKEN,
    STOPPED,
    Requests,
    decode_block,
    prefill_chunk,
    start,
)
from tests.helpers import AS_USERS
from tests.jaxkv.plain_model import plain_greedy, plain_model

pytestmark = pytest.mark.both_pythons


def cache_config(model, **sizes):
    return jaxkv.CacheConfig(layers=model.layer_specs(jaxkv.Keep()), **sizes)


def requests_of(prompt_lens, limits, stops, sampling):
    batch = len(prompt_lens)
    return Requests(
        prompt_lens=jnp.asarray(prompt_lens, jnp.int32),
        seeds=jnp.zeros(batch, jnp.uint32),
        limits=jnp.asarray(limits, jnp.int32),
        stop_ids=jnp.asarray(stops, jnp.int32)[:, None],
        rules=rules_of([sampling.checked()] * batch),
        logprobs=None,
        releases=True,
    )


def test_every_row_has_its_own_limit_and_stop_tokens():
    model, prompts = plain_model(), [[5, 9, 2], [17, 3, 4], [30, 2, 2], [5, 9, 2], [5, 9, 2]]
    free = [plain_greedy(model, prompt, 7) for prompt in prompts]
    stops = [NO_TOKEN] * 3 + [free[3][2], NO_TOKEN]
    requests = requests_of([3] * 5, [7, 3, 1, 7, 7], stops, jaxkv.Sampling())
    config = cache_config(model, batch=5, max_tokens=16, max_new_tokens=2, page_size=4)
    tokens = np.full((5, 16), NO_TOKEN, np.int32)
    tokens[:, :3] = prompts
    cache, logprobs, _, fed = prefill_chunk(
        model,
        jaxkv.KVCache.create(config),
        None,
        jnp.asarray(tokens),
        requests.prompt_lens,
        chunk=2,
        backend=None,
    )
    assert fed == 10 and logprobs is None
    state = start(cache, jnp.asarray(tokens), requests)
    ended = jnp.arange(5) == 4  # by the caller
    state, out, steps = decode_block(
        model, state, requests, ended, jnp.int32(9), block=12, backend=None
    )
    got = [[int(t) for t in row if t != NO_TOKEN] for row in np.asarray(out.tokens)]
    stop = free[3].index(free[3][2]) + 1
    assert got == [free[0], free[1][:3], free[2][:1], free[3][:stop], []]
    assert np.asarray(state.status).tolist() == [LENGTH, LENGTH, LENGTH, STOPPED, STOPPED]
    assert np.asarray(state.lens).tolist() == [10, 6, 4, 3 + stop, 3]
    known = [row[row != NO_TOKEN].tolist() for row in np.asarray(state.tokens)]
    assert known == [prompt + more for prompt, more in zip(prompts, got, strict=True)]
    assert steps == 7
    assert not np.asarray(state.cache.pages_in_use).any()  # ended rows give their pages back


def test_the_compiled_block_calls_no_host_and_copies_no_pool():
    model = plain_model()
    config = cache_config(model, batch=2, max_tokens=40000, max_new_tokens=8)
    cache = jax.eval_shape(lambda: jaxkv.KVCache.create(config))
    sampling = jaxkv.Sampling(temperature=0.7, top_k=5, repetition_penalty=1.1, min_tokens=2)
    requests = requests_of([3, 3], [9, 9], [0, 1], sampling)
    tokens = jax.ShapeDtypeStruct((2, 100), jnp.int32)
    state = jax.eval_shape(start, cache, tokens, requests)
    ended, steps = jax.ShapeDtypeStruct((2,), bool), jax.ShapeDtypeStruct((), jnp.int32)
    compiled = decode_block.lower(
        model, state, requests, ended, steps, block=16, backend=None
    ).compile(AS_USERS)
    text = compiled.as_text()
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text
    pool = cache.stores[0].pages.arrays["k"]
    shape = ",".join(map(str, pool.shape))
    assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text)
    assert compiled.memory_analysis().temp_size_in_bytes < pool.size * 4 / 20
