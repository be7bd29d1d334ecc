"""A model that has the members of `Model` and no others runs through the whole library."""

import numpy as np
import pytest
from flax import nnx

import jaxkv
import models
from jaxkv import Keep, Sizes
from models.random_weights import named_shape
from tests.jaxkv.plain_model import plain_greedy, plain_hidden, plain_model

PROMPTS = [[5, 9, 31, 3], [17], list(range(2, 25))]
SIZES = Sizes(page_size=4, chunk=8, block=3)


def test_plain_models_and_decoders_are_models():
    decoder = nnx.eval_shape(lambda: models.Decoder(named_shape("tiny"), nnx.Rngs(0)))
    assert isinstance(plain_model(), jaxkv.Model)
    assert isinstance(decoder, jaxkv.Model)
    assert decoder.vocab_size == 300


@pytest.mark.parametrize("window", [None, 3])
def test_a_plain_model_generates_as_its_formula_does(window):
    model = plain_model()
    expected = [plain_greedy(model, prompt, 10, window) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 10
    result = jaxkv.generate(model, PROMPTS, keep=Keep(window=window), max_tokens=10, sizes=SIZES)
    assert result.tokens == expected


def test_what_the_model_says_is_kept_to():
    tokens = plain_greedy(plain_model(), PROMPTS[0], 8)
    stop = next(n for n in range(1, 8) if tokens[n] not in tokens[:n])
    stops = plain_model(eos_ids=(tokens[stop],), max_position=12)
    result = jaxkv.generate(stops, PROMPTS[:1], max_tokens=8, sizes=SIZES)
    assert (result.tokens, result.stop_reasons) == ([tokens[: stop + 1]], ["stop"])
    with pytest.raises(ValueError, match="with max_tokens=9 more than the 12 the model"):
        jaxkv.generate(stops, PROMPTS[:1], max_tokens=9)
    with pytest.raises(ValueError, match="prompt 0 has token 40, and vocab_size=40"):
        jaxkv.generate(stops, [[40]])


def test_a_plain_model_through_every_kind_of_page():
    keep = Keep(codec="int8", window=5, sink_tokens=2, keep_first=1, dtype="bfloat16")
    result = jaxkv.generate(plain_model(), PROMPTS, keep=keep, max_tokens=10, sizes=SIZES)
    assert [len(tokens) for tokens in result.tokens] == [10, 10, 10]
    assert [spec.codec for spec in result.config.layers] == ["exact", "int8"]


def test_key_means_of_a_plain_model_are_those_of_its_formula():
    model, tokens = plain_model(), np.arange(53) * 7 % 40
    means = jaxkv.fit_key_means(model, tokens, chunk=16)
    _, keys = plain_hidden(model, tokens)
    for mean, k in zip(means, keys, strict=True):
        np.testing.assert_allclose(mean, k[1:].mean(axis=0), atol=2e-5)
