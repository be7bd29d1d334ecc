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
from scripts.shared.documents import Document

ORACLE = Path(__file__).parents[2] / "oracles" / "llama"


@pytest.fixture(scope="module")
def model():
    """Sharpened: the oracle's predictions are so near uniform that there is no KL to speak of."""
    tiny = models.load(ORACLE, dtype="float32", scan=True)
    tiny.norm.weight[...] = 8 * tiny.norm.weight[...]
    return tiny


TOKENS = np.random.default_rng(0).integers(0, 256, 61).astype(np.int32)


def document(tokens, rows=None, choices=0) -> Document:
    """A text of these tokens, or the given predictions of it."""
    rows = np.arange(len(tokens) - 1) if rows is None else np.asarray(rows)
    choices = np.zeros((len(rows), 0), np.int32) if np.ndim(choices) == 0 else np.asarray(choices)
    return Document(tokens, rows, choices, False)


def compare(model, codecs, *, chunk: int, window: int | None = None, read=None):
    """`read_document` with pages of 8 tokens."""

    def config(codec: str) -> jaxkv.CacheConfig:
        keep = jaxkv.Keep(codec=codec, dtype="float32", window=window)
        return jaxkv.CacheConfig(
            layers=model.layer_specs(keep),
            batch=1,
            max_tokens=len(TOKENS),
            max_new_tokens=chunk,
            page_size=8,
        )

    coded = {f"{codec}": config(codec) for codec in codecs}
    return scoring.read_document(model, read or document(TOKENS), config("exact"), coded)


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

    read = compare(model, ("3bit_nc",), chunk=16)
    found, p, q = read["3bit_nc"].scores, log_probs("exact"), log_probs("3bit_nc")
    want = np.sum(np.exp(p) * (p - q), axis=-1)
    row = np.arange(len(want))
    assert want.mean() > 1e-4
    # Rounding may flip a code at a threshold, and which do differs between compilers.
    np.testing.assert_allclose(found.kl, want, rtol=3e-2, atol=1e-5)
    np.testing.assert_allclose(found.exact_log_prob, p[row, TOKENS[1:]], atol=1e-4)
    np.testing.assert_allclose(found.log_prob, q[row, TOKENS[1:]], rtol=2e-3)
    np.testing.assert_array_equal(found.agrees, p.argmax(-1) == q.argmax(-1))
    np.testing.assert_array_equal(found.exact_right, p.argmax(-1) == TOKENS[1:])
    np.testing.assert_array_equal(found.right, q.argmax(-1) == TOKENS[1:])
    # The exact cache beside itself: what it predicts, and no difference.
    same = read["exact"].scores
    np.testing.assert_array_equal(same.log_prob, found.exact_log_prob)
    np.testing.assert_array_equal(same.right, found.exact_right)
    assert not same.kl.any() and same.agrees.all()

    # The same predictions, picked among a few tokens, the target among them in half of the cases.
    rows, rng = np.array([3, 20, 47, 59]), np.random.default_rng(2)
    choices = rng.integers(0, 256, (4, 5)).astype(np.int32)
    choices[:2, 2] = TOKENS[rows[:2] + 1]
    read = compare(model, ("3bit_nc",), chunk=16, read=document(TOKENS, rows, choices))
    picked = read["3bit_nc"].scores
    np.testing.assert_allclose(picked.kl, found.kl[rows], rtol=1e-3, atol=1e-6)
    best = lambda log: np.take_along_axis(
        choices, np.take_along_axis(log[rows], choices, 1).argmax(1)[:, None], 1
    )[:, 0]
    np.testing.assert_array_equal(picked.right, best(q) == TOKENS[rows + 1])
    np.testing.assert_array_equal(picked.exact_right, best(p) == TOKENS[rows + 1])
    np.testing.assert_array_equal(picked.agrees, best(p) == best(q))


@pytest.mark.parametrize("codec, window", [("3bit_nc", None), ("tq3", 24)])
def test_chunks_do_not_change_the_scores(model, codec, window):
    """But for rounding: a value between two codes may fall to the other side."""
    one, other = (compare(model, (codec,), chunk=n, window=window)[codec].scores for n in (60, 7))
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


@pytest.mark.parametrize("codec, window", [("exact", None), ("tq3", None), ("4bit_nc", 24)])
def test_held_bits_count_every_page_in_use(codec, window):
    """Pages of 8 tokens, 60 tokens: numbered by hand for the recipe and the window."""
    spec = jaxkv.LayerSpec(
        kv_heads=2, head_dim=64, codec=codec, window=window, sink_tokens=2 if window else 0,
        dtype="float32",
    )  # fmt: skip
    config = jaxkv.CacheConfig(
        layers=(spec,), batch=1, max_tokens=64, max_new_tokens=4, page_size=8
    )

    @jax.jit
    def step(cache):
        x = jnp.ones((1, 4, 2, 64))
        cache, _ = cache.prepare(jnp.full(1, 4, jnp.int32)).attend(0, x, x, x)
        return cache.commit(jnp.full(1, 4, jnp.int32))

    cache = jaxkv.KVCache.create(config)
    for _ in range(15):
        cache = step(cache)
    coded = get_codec(codec).bits_per_value(64, 8) if codec != "exact" else 0
    # Exact pages, pages of codes, tokens that the next query can see. 60 tokens begin 8 pages, of
    # which the recipe keeps the first and the newest two; the window's 24 tokens lie in 4 pages.
    exact, codes, seen = {"exact": (8, 0, 60), "tq3": (3, 5, 60), "4bit_nc": (1, 4, 26)}[codec]
    want = 8 * (exact * 32 + codes * coded) / seen
    assert scoring.held_bits(cache) == pytest.approx(want)


def test_perplexity_is_that_of_the_scores(model):
    """Through a cache of its own, in chunks that do not divide the text."""
    scores = compare(model, (), chunk=16)["exact"].scores
    config = jaxkv.CacheConfig(
        layers=model.layer_specs(jaxkv.Keep(dtype="float32")),
        batch=1,
        max_tokens=len(TOKENS),
        max_new_tokens=16,
        page_size=8,
    )
    steps = []
    found = scoring.perplexity(model, TOKENS, config, done=lambda: steps.append(1))
    want = np.exp(-np.mean(np.float64(scores.log_prob)))
    assert found == pytest.approx(want, rel=1e-4) and len(steps) == 4
