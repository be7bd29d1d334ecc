"""scripts/shared/scoring.py: its numbers against independent ones."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
import models
from jaxkv.codecs import codec_names, get_codec
from scripts.shared import scoring

ORACLE = Path(__file__).parents[2] / "oracles" / "llama"


@pytest.fixture(scope="module")
def model():
    """Sharpened: the oracle's predictions are so near uniform that there is no KL to speak of."""
    tiny = models.load(ORACLE, dtype="float32", scan=True)
    tiny.norm.weight[...] = 8 * tiny.norm.weight[...]
    return tiny


TOKENS = np.random.default_rng(0).integers(0, 256, 61).astype(np.int32)


def compare(model, codecs, *, chunk: int, window: int | None = None):
    """`compare_caches` with pages of 8 tokens."""

    def config(codec: str) -> jaxkv.CacheConfig:
        keep = jaxkv.Keep(codec=codec, dtype="float32", window=window)
        return jaxkv.CacheConfig(
            layers=model.layer_specs(keep),
            batch=1,
            max_tokens=len(TOKENS),
            max_new_tokens=chunk,
            page_size=8,
        )

    return scoring.compare_caches(
        model, TOKENS, config("exact"), {codec: config(codec) for codec in codecs}
    )


def test_kl_of_two_coins():
    p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    found = scoring.kl_divergence(p, q)
    assert found.shape == (1,)
    np.testing.assert_allclose(found, 0.5 * math.log(4 / 3), rtol=1e-6)


def test_kl_of_a_token_that_the_codec_all_but_excludes():
    p = jnp.log(jnp.array([0.5, 0.5]))
    q = jnp.array([-300.0, 0.0])  # exp(300) is no float32
    want = 0.5 * (math.log(0.5) + 300) + 0.5 * math.log(0.5)
    np.testing.assert_allclose(scoring.kl_divergence(p, q), want, rtol=1e-6)
    assert np.isfinite(scoring.kl_divergence(q, p))


def test_small_kl_does_not_drown_in_rounding():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (4, 5000))
    other = logits + rng.normal(0, 1e-4, logits.shape)
    log = lambda x: x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
    p, q = log(logits), log(other)
    want = np.sum(np.exp(p) * (p - q), axis=-1)
    found = scoring.kl_divergence(jnp.asarray(p, "float32"), jnp.asarray(q, "float32"))
    assert np.all(want < 1e-8) and np.all(np.asarray(found) >= 0)
    np.testing.assert_allclose(found, want, rtol=0.02)


def test_summary_of_two_predictions():
    scores = scoring.Scores(
        kl=np.float32([0.1, 0.3]),
        exact_log_prob=np.log(np.float32([0.5, 0.5])),
        log_prob=np.log(np.float32([0.5, 0.125])),
        agrees=np.float32([1, 0]),
    )
    found = scoring.summarize("name", scores, 4.5)
    assert found["codec"] == "name" and found["bits_per_value"] == 4.5
    assert found["kl"] == pytest.approx(0.2) and found["kl_p99"] == pytest.approx(0.298)
    assert found["ppl_ratio"] == pytest.approx(2) and found["top1"] == 0.5


def test_exact_agrees_with_exact(model):
    scores, caches = compare(model, ("exact",), chunk=16)
    found = scoring.summarize("exact", scores["exact"], scoring.stored_bits(caches["exact"]))
    assert found["kl"] == found["kl_p99"] == 0 and found["top1"] == found["ppl_ratio"] == 1
    assert found["bits_per_value"] == 32


def test_scores_equal_what_single_steps_predict(model):
    """Token by token with plain `prepare`, model, `commit`, and numpy's arithmetic in float64."""

    @jax.jit
    def step(model, token, cache):
        one = jnp.ones(1, jnp.int32)
        hidden, cache = model(token[None, None], cache.prepare(one))
        return model.unembed(hidden)[0, 0], cache.commit(one)

    def log_probs(codec):
        layers = model.layer_specs(jaxkv.Keep(dtype="float32", codec=codec))
        cache = jaxkv.KVCache.create(
            jaxkv.CacheConfig(layers=layers, batch=1, max_tokens=len(TOKENS), page_size=8)
        )
        rows = []
        for token in TOKENS[:-1]:
            row, cache = step(model, jnp.asarray(token), cache)
            rows.append(np.float64(row))
        rows = np.stack(rows)
        return rows - np.log(np.sum(np.exp(rows), axis=-1, keepdims=True))

    scores, _ = compare(model, ("3bit_nc",), chunk=16)
    found, p, q = scores["3bit_nc"], log_probs("exact"), log_probs("3bit_nc")
    want = np.sum(np.exp(p) * (p - q), axis=-1)
    row = np.arange(len(want))
    assert want.mean() > 1e-4
    # Rounding may flip a code at a threshold, and which do differs between compilers.
    np.testing.assert_allclose(found.kl, want, rtol=3e-2, atol=1e-5)
    np.testing.assert_allclose(found.exact_log_prob, p[row, TOKENS[1:]], atol=1e-4)
    np.testing.assert_allclose(found.log_prob, q[row, TOKENS[1:]], rtol=2e-3)
    np.testing.assert_array_equal(found.agrees, p.argmax(-1) == q.argmax(-1))


@pytest.mark.parametrize("codec, window", [("3bit_nc", None), ("tq3", 24)])
def test_chunks_do_not_change_the_scores(model, codec, window):
    """But for rounding: a value between two codes may fall to the other side."""
    one, other = (compare(model, (codec,), chunk=n, window=window)[0][codec] for n in (60, 7))
    assert one.kl.mean() > 1e-5
    np.testing.assert_allclose(other.kl, one.kl, rtol=5e-2, atol=1e-4)
    np.testing.assert_allclose(other.log_prob, one.log_prob, rtol=2e-3)


@pytest.mark.parametrize("codec", codec_names())
def test_stored_bits_are_the_codecs_own(codec):
    spec = jaxkv.LayerSpec(kv_heads=2, head_dim=64, codec=codec, dtype="float32")
    config = jaxkv.CacheConfig(layers=(spec, spec), batch=1, max_tokens=300)
    known = 32 if codec == "exact" else get_codec(codec).bits_per_value(64, 64)
    assert scoring.stored_bits(jaxkv.KVCache.create(config)) == known


def test_exact_layers_count_with_their_own_bits():
    exact = jaxkv.LayerSpec(kv_heads=2, head_dim=64, dtype="bfloat16")
    coded = jaxkv.LayerSpec(kv_heads=2, head_dim=64, codec="4bit_nc", dtype="bfloat16")
    config = jaxkv.CacheConfig(layers=(exact, coded, coded, coded), batch=1, max_tokens=100)
    cache = jaxkv.KVCache.create(config)
    assert scoring.stored_bits(cache) == (16 + 3 * 4.375) / 4


def test_perplexity_is_that_of_the_scores(model):
    """Through a cache of its own, in chunks that do not divide the text."""
    scores, _ = compare(model, ("exact",), chunk=16)
    config = jaxkv.CacheConfig(
        layers=model.layer_specs(jaxkv.Keep(dtype="float32")),
        batch=1,
        max_tokens=len(TOKENS),
        max_new_tokens=16,
        page_size=8,
    )
    steps = []
    found = scoring.perplexity(model, TOKENS, config, done=lambda: steps.append(1))
    want = np.exp(-np.mean(np.float64(scores["exact"].exact_log_prob)))
    assert found == pytest.approx(want, rel=1e-4) and len(steps) == 4
