"""The jitted steps: each row has its own limits, and a block runs without the host."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
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


def test_every_row_has_its_own_limit_and_stop_tokens():
    model, prompts = plain_model(), [[5, 9], [17, 3], [30, 2], [5, 9]]
    free = [plain_greedy(model, prompt, 7) for prompt in prompts]
    requests = Requests(
        seeds=jnp.zeros(4, jnp.uint32),
        limits=jnp.asarray([7, 3, 1, 7], jnp.int32),
        stop_ids=jnp.asarray([[NO_TOKEN], [NO_TOKEN], [NO_TOKEN], [free[3][2]]], jnp.int32),
        sampling=jaxkv.Sampling(),
    )
    config = cache_config(model, batch=4, max_tokens=16, max_new_tokens=2, page_size=4)
    cache, last, _, fed = prefill_chunk(
        model,
        jaxkv.KVCache.create(config),
        jnp.zeros((4, model.hidden_size)),
        jnp.asarray(prompts, jnp.int32),
        jnp.full(4, 2, jnp.int32),
        chunk=2,
        backend=None,
    )
    assert fed == 8
    state = start(model, cache, last, requests)
    first = np.asarray(state.token)
    state, out, steps = decode_block(model, state, requests, steps=9, backend=None)
    got = [
        [int(token), *(int(t) for t in row if t != NO_TOKEN)]
        for token, row in zip(first, np.asarray(out), strict=True)
    ]
    stop = free[3].index(free[3][2]) + 1
    assert got == [free[0], free[1][:3], free[2][:1], free[3][:stop]]
    assert np.asarray(state.status).tolist() == [LENGTH, LENGTH, LENGTH, STOPPED]
    assert np.asarray(state.produced).tolist() == [7, 3, 1, stop]
    assert steps == 6
    assert not np.asarray(state.cache.pages_in_use).any()  # ended rows give their pages back


def test_the_compiled_block_calls_no_host_and_copies_no_pool():
    model = plain_model()
    config = cache_config(model, batch=2, max_tokens=40000, max_new_tokens=8)
    cache = jax.eval_shape(lambda: jaxkv.KVCache.create(config))
    requests = Requests(
        seeds=jnp.zeros(2, jnp.uint32),
        limits=jnp.full(2, 9, jnp.int32),
        stop_ids=jnp.zeros((2, 1), jnp.int32),
        sampling=jaxkv.Sampling(temperature=0.7, top_k=5),
    )
    last = jax.ShapeDtypeStruct((2, model.hidden_size), jnp.float32)
    state = jax.eval_shape(start, model, cache, last, requests)
    compiled = decode_block.lower(model, state, requests, steps=16, backend=None).compile(AS_USERS)
    text = compiled.as_text()
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text
    pool = cache.stores[0].pages.arrays["k"]
    shape = ",".join(map(str, pool.shape))
    assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text)
    assert compiled.memory_analysis().temp_size_in_bytes < pool.size * 4 / 20
