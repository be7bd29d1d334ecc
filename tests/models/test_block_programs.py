"""Blocks that are alike share one program, with the bits and the memory of inlined ones."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
import models
from models import decoder
from models.decoder import Decoder
from models.families.architectures import architecture_config
from tests.helpers import AS_USERS
from tests.jaxkv.test_cache_memory import assert_in_place
from tests.models.numpy_mixed import gemma_config

ORACLES = Path(__file__).parents[1] / "oracles"
BATCH, CHUNK = 2, 5


def step(model, cache, ids):
    count = jnp.full(BATCH, ids.shape[1], jnp.int32)
    hidden, cache = model(ids, cache.prepare(count))
    return model.unembed(hidden), cache.commit(count)


def cache_config(model, keep):
    return jaxkv.CacheConfig(
        layers=model.layer_specs(keep),
        batch=BATCH,
        max_tokens=32,
        max_new_tokens=CHUNK,
        page_size=4,
    ).checked()


def lower(model, config, tokens=CHUNK):
    cache = jax.eval_shape(lambda: jaxkv.KVCache.create(config))
    ids = jax.ShapeDtypeStruct((BATCH, tokens), jnp.int32)
    # A new function each time: jit would return an earlier lowering.
    return jax.jit(lambda *args: step(*args)).lower(model, cache, ids)


def block_functions(text: str) -> list[str]:
    return re.findall(r"func\.func private @(_run_block\w*)\(", text)


# Gemma 3 and gpt-oss have layers of two kinds, Qwen3's mixed experts dense and sparse blocks.
@pytest.mark.both_pythons
@pytest.mark.parametrize(
    "oracle, keep, programs",
    [
        ("llama", jaxkv.Keep(), 1),
        ("gemma3", jaxkv.Keep(), 2),
        ("gpt_oss", jaxkv.Keep(), 2),
        ("gpt_oss", jaxkv.Keep(codec="int8"), 2),
        ("qwen3_moe_mixed", jaxkv.Keep(), 2),
    ],
)
def test_blocks_of_one_kind_are_lowered_once(oracle, keep, programs):
    model = models.load(ORACLES / oracle, dtype="float32", scan=False)
    text = lower(model, cache_config(model, keep)).as_text()
    assert len(block_functions(text)) == programs
    assert len(re.findall(r"call @_run_block", text)) == model.config.layers > programs


def test_layers_kept_apart_are_programs_of_their_own():
    model = models.load(ORACLES / "llama", dtype="float32", scan=False)
    alike = jaxkv.Keep(codec="int8")
    apart = jaxkv.Keep(codec="int8", keep_first=1)
    for keep, programs in ((alike, 1), (apart, 2)):
        assert len(block_functions(lower(model, cache_config(model, keep)).as_text())) == programs


def test_program_text_does_not_grow_with_depth():
    def text_of(layers):
        config = architecture_config(gemma_config("gemma3_text", num_hidden_layers=layers))
        model = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), scan=False))
        return len(lower(model, cache_config(model, jaxkv.Keep())).as_text())

    few, many = text_of(6), text_of(24)
    assert many < 2 * few


@pytest.mark.parametrize("oracle, codec", [("gemma3", "exact"), ("gpt_oss_mxfp4", "int8")])
def test_shared_blocks_give_the_bits_of_inlined_ones(oracle, codec, monkeypatch):
    model = models.load(ORACLES / oracle, dtype="float32", scan=False)
    config = cache_config(model, jaxkv.Keep(codec=codec, dtype="float32"))
    ids = np.random.default_rng(0).integers(0, 90, (4, BATCH, CHUNK))

    def run():
        program = jax.jit(lambda *args: step(*args))
        cache, outs = jaxkv.KVCache.create(config), []
        for part in jnp.asarray(ids, jnp.int32):
            logits, cache = program(model, cache, part)
            outs.append(logits)
        return outs, cache

    shared = run()
    monkeypatch.setattr(decoder, "_run_block", decoder._run_block.__wrapped__)
    assert not block_functions(lower(model, config).as_text())
    jax.tree.map(np.testing.assert_array_equal, shared, run())


@pytest.mark.both_pythons
@pytest.mark.parametrize("tokens", [1, 16])
def test_shared_blocks_copy_no_pool(tokens):
    """Two groups of layers, and the step in a loop, as decoding runs it."""
    keys = {"num_hidden_layers": 7, "sliding_window": 90_000, "sliding_window_pattern": 3}
    heads = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = architecture_config(gemma_config("gemma3_text", **keys, **heads))
    model = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), scan=False))
    layers = model.layer_specs(jaxkv.Keep(dtype="float32"))
    sizes = dict(batch=BATCH, max_tokens=130_000, max_new_tokens=16)
    cache = jax.eval_shape(lambda: jaxkv.KVCache.create(jaxkv.CacheConfig(layers=layers, **sizes)))
    assert len(cache.config.groups) == 2

    def loop(cache, model, ids):
        def body(carry):
            count, cache, _ = carry
            logits, cache = step(model, cache, ids)
            return count + 1, cache, logits[0, 0, 0]

        init = (jnp.int32(0), cache, jnp.float32(0))
        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, init)[1:]

    ids = jax.ShapeDtypeStruct((BATCH, tokens), jnp.int32)
    lowered = jax.jit(loop, donate_argnums=0).lower(cache, model, ids)
    assert len(block_functions(lowered.as_text())) == 2
    assert_in_place(cache, lowered.compile(AS_USERS))
