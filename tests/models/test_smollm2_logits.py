"""The real SmolLM2-135M-Instruct against transformers: logits and greedy continuations.

Its token ids: `test_tokenizer.py`.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
import models

pytestmark = [pytest.mark.slow, pytest.mark.optimized]

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "smollm2.json").read_text("utf-8"))
CASES = {case["name"]: case for case in ORACLE["cases"]}
TOLERANCE = 2e-3  # logits up to 35, sums in another order through 30 layers


@pytest.fixture(scope="module")
def checkpoint():
    try:
        return models.open_checkpoint("smollm2")
    except models.CheckpointError as error:
        pytest.skip(f"SmolLM2 is not here: {error}")


@pytest.fixture(scope="module")
def model(checkpoint):
    """Scanned, as its many programs compile sooner; one test runs the unrolled one."""
    return models.load(checkpoint, dtype="float32", scan=True)


@pytest.fixture(scope="module")
def hidden(model):
    """Final hidden states of every case, `[tokens, hidden]`, each prompt in one prefill."""
    short = {name: case for name, case in CASES.items() if len(case["input_ids"]) < 64}
    long = {name: case for name, case in CASES.items() if name not in short}
    return {**prefill(model, short), **prefill(model, long)}


def prefill(model, cases):
    """Runs the prompts side by side."""
    prompts = [case["input_ids"] for case in cases.values()]
    lens = jnp.asarray([len(p) for p in prompts], jnp.int32)
    tokens = np.zeros((len(prompts), int(lens.max())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    config = jaxkv.CacheConfig(
        layers=model.layer_specs(),
        batch=len(prompts),
        max_tokens=tokens.shape[1],
        max_new_tokens=tokens.shape[1],
    )

    @jax.jit
    def step(model, tokens, cache):
        return model(tokens, cache.prepare(lens))[0]

    out = step(model, tokens, jaxkv.KVCache.create(config))
    return {name: row[:n] for name, row, n in zip(cases, out, lens.tolist(), strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(model, hidden, name):
    stored = CASES[name]["logits"]
    assert len(stored) == 3
    logits = np.asarray(model.unembed(hidden[name][np.array([int(p) for p in stored])]))
    for row, expected in zip(logits.astype(np.float64), stored.values(), strict=True):
        close = lambda found, wanted: np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
        close(row[:8], expected["first8"])
        ids, values = zip(*expected["top5"], strict=True)
        close(row[list(ids)], values)
        assert np.argsort(-row)[:5].tolist() == list(ids)
        close(row.max() + np.log(np.exp(row - row.max()).sum()), expected["logsumexp"])


@pytest.mark.parametrize("name", CASES)
def test_greedy_continuation_is_that_of_transformers(model, name):
    case = CASES[name]
    prompts, count = [case["input_ids"]], len(case["greedy"])
    result = jaxkv.generate(model, prompts, max_tokens=count, sizes=jaxkv.Sizes(chunk=64))
    assert result.tokens == [case["greedy"]]
    stops = case["greedy"][-1] == ORACLE["eos"]
    assert result.stop_reasons == ["stop" if stops else "length"]


def test_batch_gives_the_same_tokens_as_alone(checkpoint):
    model = models.load(checkpoint, dtype="float32", scan=False)
    prompts = [case["input_ids"] for case in CASES.values()]
    result = jaxkv.generate(model, prompts, max_tokens=64)
    assert result.config.batch == len(CASES)
    for case, tokens, reason in zip(
        CASES.values(), result.tokens, result.stop_reasons, strict=True
    ):
        expected = case["greedy"]
        assert tokens[: len(expected)] == expected, case["name"]
        assert (reason == "stop") == (tokens[-1] == ORACLE["eos"])
        assert reason == "stop" or len(tokens) == 64


def test_bfloat16_run_is_finite_and_near(checkpoint, hidden):
    model = models.load(checkpoint, dtype="bfloat16", scan=True)
    cases = {name: CASES[name] for name in ("capital", "code")}
    for name, row in prefill(model, cases).items():
        assert row.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(model.unembed(row))).all()
        exact = np.asarray(hidden[name], np.float32)
        error = np.linalg.norm(np.asarray(row, np.float32) - exact) / np.linalg.norm(exact)
        assert error < 0.1  # 8 bits of mantissa through 30 layers
    result = jaxkv.generate(model, [CASES["capital"]["input_ids"]], max_tokens=8)
    assert result.tokens[0][0] == CASES["capital"]["greedy"][0]
    assert result.config.layers[0].dtype == "bfloat16"
