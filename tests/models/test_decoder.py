"""The decoder over caches of several groups: scans of a pattern, codecs, greedy tokens, reports."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
import models
from jaxkv.codecs import codec_names
from models.decoder import Decoder
from models.families.architectures import architecture_config
from models.pattern import Place, pattern_places
from tests.helpers import AS_USERS
from tests.jaxkv.test_cache_memory import assert_in_place
from tests.models.numpy_mixed import FULL, SLIDING, gemma_config, gpt_oss_config

ORACLES = Path(__file__).parents[1] / "oracles"
NEW = 9
PROMPTS = [[3, 17, 99, 40, 5, 8, 201, 7] * 4 + [11], [250, 4, 4], list(range(60, 84))]
QUICK = ("exact", "int8", "tq4")  # the others are marked slow


@functools.cache
def load(oracle, scan):
    return models.load(ORACLES / oracle, dtype="float32", scan=scan)


def generate(model, **options):
    sizes = jaxkv.Sizes(page_size=8, chunk=16, block=4)
    return jaxkv.generate(model, PROMPTS, max_tokens=NEW, stop_ids=(), sizes=sizes, **options)


@jax.jit
def last_logits(model, tokens, count):
    """Logits after the first `count` of `tokens`, by one prefill of a fresh cache."""
    size = tokens.shape[1]
    layers = model.layer_specs(jaxkv.Keep(dtype="float32"))
    config = jaxkv.CacheConfig(layers=layers, batch=1, max_tokens=size, max_new_tokens=size)
    cache = jaxkv.KVCache.create(config).prepare(count[None])
    hidden, _ = model(tokens, cache)
    return model.unembed(hidden)[0, count - 1]


def uncached(model, prompt):
    """Greedy tokens of one sequence, everything computed anew for each."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + NEW):
        tokens[0, end] = int(last_logits(model, tokens, jnp.int32(end)).argmax())
    return tokens[0, len(prompt) : len(prompt) + NEW].tolist()


@pytest.mark.parametrize("oracle", ["gemma3", "gpt_oss", "gpt_oss_mxfp4"])
def test_cached_greedy_tokens_equal_uncached_ones(oracle):
    expected = [uncached(load(oracle, False), prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert generate(load(oracle, True)).tokens == expected
    if oracle != "gpt_oss":  # the packed one is the same but for its experts
        assert generate(load(oracle, False)).tokens == expected


# All with both models, or the one and the other in turn: a codec sees heads, not models, and what
# it stores is held to the formula in tests/jaxkv/test_coded_attend.py.
MODELS = ("gemma3", "gpt_oss_mxfp4")
SLOW = [codec for codec in codec_names() if codec not in QUICK]


@pytest.mark.parametrize(
    "codec, oracle",
    [
        *[(codec, oracle) for codec in QUICK for oracle in MODELS],
        *[
            pytest.param(codec, MODELS[n % 2], marks=pytest.mark.slow)
            for n, codec in enumerate(SLOW)
        ],
    ],
)
def test_every_codec_generates(oracle, codec):
    result = generate(load(oracle, True), keep=jaxkv.Keep(codec=codec))
    assert [len(tokens) for tokens in result.tokens] == [NEW] * len(PROMPTS)
    assert result.stop_reasons == ["length"] * len(PROMPTS)
    assert all(group.codec == codec for group in jaxkv.explain(result.config) if not group.note)


@jax.jit
def three_chunks(model, tokens, cache):
    """Logits of the last of three equal chunks."""

    def step(carry, chunk):
        cache, _ = carry
        count = jnp.full(2, chunk.shape[1], jnp.int32)
        hidden, cache = model(chunk, cache.prepare(count))
        return (cache.commit(count), hidden), None

    first = jnp.zeros((2, tokens.shape[2], model.config.hidden_size))
    (_, hidden), _ = jax.lax.scan(step, (cache, first), tokens)
    return model.unembed(hidden)


@functools.cache
def logits_of_codec(oracle, codec):
    model = load(oracle, True)
    layers = model.layer_specs(jaxkv.Keep(dtype="float32", codec=codec))
    cache = jaxkv.KVCache.create(
        jaxkv.CacheConfig(layers=layers, batch=2, max_tokens=60, max_new_tokens=20, page_size=4)
    )
    tokens = np.arange(2 * 60).reshape(2, 3, 20).swapaxes(0, 1) % 251
    return three_chunks(model, tokens, cache)


@pytest.mark.parametrize("oracle", ["gemma3", "gpt_oss"])
@pytest.mark.parametrize("codec", ["int8", "tq4"])
def test_coded_steps_stay_near_exact_ones(oracle, codec):
    """Tokens may differ where two logits are near; a codec that read wrong pages would be lost."""
    error = np.abs(logits_of_codec(oracle, codec) - logits_of_codec(oracle, "exact")).max()
    assert 0 < error < {"int8": 0.15, "tq4": 1.5}[codec]


def reports_of(config) -> list[str]:
    """What `explain` says of each group with codec tq4, which keeps two pages of 64 exact."""
    layers = config.layer_specs(jaxkv.Keep(codec="tq4"))
    cache = jaxkv.CacheConfig(layers=layers, batch=1, max_tokens=8192, page_size=64)
    return [str(report) for report in jaxkv.explain(cache, platform="cpu")]


def test_a_window_within_the_recent_span_stays_exact_and_explain_says_so():
    sliding, full = reports_of(architecture_config(gpt_oss_config(sliding_window=128)))
    assert sliding.startswith("layers 0,2: window 128; exact bfloat16 ")
    assert "(not tq4: the window lies within its 2 exact pages)" in sliding
    assert "all tokens; tq4, " in full and "newest 2 and first 1 pages bfloat16" in full


def test_a_window_beyond_the_recent_span_is_coded():
    keys = {"sliding_window": 1024, "num_hidden_layers": 6}
    sliding, full = reports_of(architecture_config(gemma_config("gemma3_text", **keys)))
    assert "layers 0-4: window 1024; tq4, " in sliding
    assert "layers 5-5: all tokens; tq4, " in full


@pytest.mark.parametrize(
    "kinds, period",
    [
        ([FULL] * 4, 1),
        ([SLIDING, FULL] * 3, 2),
        ([SLIDING, FULL, SLIDING], 2),
        ([SLIDING] * 5 + [FULL, SLIDING], 6),
        ([FULL, FULL, SLIDING], 3),
        ([FULL], 1),
    ],
)
def test_period_is_the_smallest(kinds, period):
    keys = {"num_hidden_layers": len(kinds), "layer_types": kinds}
    assert architecture_config(gpt_oss_config(**keys)).period == period


def cache_of(config, **options):
    layers = config.layer_specs(jaxkv.Keep(dtype="float32", **options))
    return jaxkv.CacheConfig(layers=layers, batch=1, max_tokens=64, page_size=8)


def test_places_of_a_pattern():
    config = architecture_config(gemma_config("gemma3_text", num_hidden_layers=13))
    places = pattern_places(cache_of(config), period=6, repeats=2)
    assert places == [*[Place(0, n, 5) for n in range(5)], Place(1, 0, 1)]


def test_narrowed_to_one_group_a_pattern_still_scans():
    config = architecture_config(gpt_oss_config(num_hidden_layers=6))
    places = pattern_places(cache_of(config, window=11), period=2, repeats=3)
    assert places == [Place(0, 0, 2), Place(0, 1, 2)]


@pytest.mark.parametrize("kept", [{"keep_first": 1}, {"keep_first": 2}, {"keep_last": 1}])
def test_layers_kept_unlike_the_pattern_are_refused(kept):
    config = architecture_config(gpt_oss_config(num_hidden_layers=6))
    with pytest.raises(ValueError, match="scan=False"):
        pattern_places(cache_of(config, codec="int8", **kept), period=2, repeats=3)


def test_unrolled_models_keep_single_layers_exact():
    keep = jaxkv.Keep(codec="int8", keep_first=1)
    with pytest.raises(ValueError, match="scan=False"):
        generate(load("gpt_oss", True), keep=keep)
    result = generate(load("gpt_oss", False), keep=keep)
    assert [len(tokens) for tokens in result.tokens] == [NEW] * len(PROMPTS)


def test_cache_of_another_number_of_layers_is_refused():
    config = architecture_config(gpt_oss_config(num_hidden_layers=2))
    other = architecture_config(gpt_oss_config(num_hidden_layers=3))

    def run():
        model = Decoder(config, nnx.Rngs(0), scan=False)
        cache = jaxkv.KVCache.create(cache_of(other))
        return model(jnp.zeros((1, 1), jnp.int32), cache.prepare(jnp.ones(1, jnp.int32)))

    with pytest.raises(ValueError, match="3 layers and must have 2"):
        nnx.eval_shape(run)


def test_streaming_turns_sinks_by_each_layers_own_rope_scanned_or_not():
    keep = jaxkv.Keep(window=13, sink_tokens=3, sink_positions="cache")
    scanned = generate(load("gemma3", True), keep=keep).tokens
    assert scanned == generate(load("gemma3", False), keep=keep).tokens
    assert scanned != generate(load("gemma3", True)).tokens


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("codec", ["exact", "tq3"])
def test_scanned_pattern_makes_no_copy_of_its_two_groups_pools(codec, tokens):
    """Two places of the pattern share a group and one layer is left over behind the scan."""
    keys = {"num_hidden_layers": 7, "sliding_window": 90_000, "sliding_window_pattern": 3}
    heads = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = architecture_config(gemma_config("gemma3_text", **keys, **heads))
    model = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), scan=True))
    assert (model.repeats, len(model.pattern), len(model.layers)) == (2, 3, 1)
    layers = model.layer_specs(jaxkv.Keep(dtype="float32", codec=codec))
    sizes = dict(batch=2, max_tokens=130_000, max_new_tokens=16)
    cache = jax.eval_shape(lambda: jaxkv.KVCache.create(jaxkv.CacheConfig(layers=layers, **sizes)))
    assert len(cache.config.groups) == 2

    def step(cache, model, ids):
        count = jnp.full(2, tokens, jnp.int32)
        hidden, cache = model(ids, cache.prepare(count))
        return cache.commit(count), hidden

    ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    assert_in_place(
        cache, jax.jit(step, donate_argnums=0).lower(cache, model, ids).compile(AS_USERS)
    )


def test_bfloat16_models_run_and_embeddings_are_scaled_in_their_dtype():
    config = architecture_config(gemma_config("gemma3_text", hidden_size=30))
    model = Decoder(config, nnx.Rngs(0), dtype="bfloat16")
    cache = jaxkv.KVCache.create(cache_of(config))

    @jax.jit
    def run(model, tokens, cache):
        hidden, _ = model(tokens, cache.prepare(jnp.ones(1, jnp.int32)))
        return hidden, model.unembed(hidden)

    hidden, logits = run(model, jnp.zeros((1, 1), jnp.int32), cache)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
