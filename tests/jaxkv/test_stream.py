"""What generation reports and obeys per request: blocks, strings that stop, log-probabilities."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Sampling, Sizes, StopText
from jaxkv.steps import decode_block
from tests.jaxkv.plain_model import plain_greedy, plain_hidden, plain_model

pytestmark = pytest.mark.both_pythons

PROMPTS = [[5, 9, 31, 3], [17], list(range(2, 25))]
SIZES = Sizes(page_size=4, chunk=8, block=3)


@pytest.fixture(scope="module")
def model():
    return plain_model()


@pytest.fixture(scope="module")
def greedy(model):
    return [plain_greedy(model, prompt, 10) for prompt in PROMPTS]


def generate(model, prompts=PROMPTS, **options):
    return jaxkv.generate(model, prompts, sizes=SIZES, **(dict(max_tokens=10) | options))


def spell(tokens):
    """Text of two characters per token: aa, ab, ..., so that strings cross token borders."""
    return "".join(chr(97 + token // 6) + chr(97 + token % 6) for token in tokens)


def test_a_stream_yields_every_token_in_order_and_empty_lists_while_it_reads(model, greedy):
    stream = jaxkv.stream(model, PROMPTS, max_tokens=10, sizes=SIZES)
    seen, progress = [[] for _ in PROMPTS], []
    with pytest.raises(ValueError, match="still running"):
        _ = stream.result
    for new in stream:
        progress.append((stream.prompt_done, sum(map(len, new))))
        for have, more in zip(seen, new, strict=True):
            have += more
    assert seen == greedy == stream.result.tokens
    # The longest prompt's 22 tokens before its last take three chunks of 8; the host reads each
    # result one chunk late. Then come a first token per prompt, and blocks of three.
    assert progress == [(0, 0), (11, 0), (25, 0), (28, 3), (28, 9), (28, 9), (28, 9)]
    assert stream.result.decode_steps == 10


def test_nothing_runs_after_a_stream_was_closed(model, greedy):
    with jaxkv.stream(model, PROMPTS, max_tokens=10, sizes=SIZES) as stream:
        for new in stream:
            if len(new[0]) == 3:
                break
    assert list(stream) == []
    result = stream.result
    assert result.stop_reasons == ["closed"] * 3
    assert result.tokens == [tokens[:4] for tokens in greedy]
    # What was done is not lost: the next call goes on where this one was.
    longer = [prompt + tokens for prompt, tokens in zip(PROMPTS, result.tokens, strict=True)]
    rest = jaxkv.generate(model, longer, max_tokens=6, cache=result.cache)
    assert rest.tokens == [tokens[4:] for tokens in greedy]
    assert rest.cached_tokens == [len(prompt) - 1 for prompt in longer]


def test_bad_input_raises_before_the_first_token_is_asked_for(model):
    with pytest.raises(ValueError, match="max_tokens=0"):
        jaxkv.stream(model, PROMPTS, max_tokens=0)


def test_every_prompt_has_its_own_limits_sampling_and_stops(model, greedy):
    hot = Sampling(temperature=2.0, top_k=9)
    alone = generate(model, PROMPTS[1:2], sampling=hot, seed=5, max_tokens=7).tokens[0]
    stop = next(n for n in range(1, 10) if greedy[2][n] not in greedy[2][:n])
    result = generate(
        model,
        max_tokens=[2, 7, 10],
        sampling=[Sampling(), hot, Sampling()],
        seed=[0, 5, 0],
        stop_ids=[[], [], [greedy[2][stop], 39]],
    )
    assert result.tokens == [greedy[0][:2], alone, greedy[2][: stop + 1]]
    assert result.stop_reasons == ["length", "length", "stop"]


def test_more_stop_tokens_run_the_same_program(model, greedy):
    stop = greedy[0][3]
    generate(model, stop_ids=[stop])
    before = decode_block._cache_size()
    result = generate(model, stop_ids=[stop, 1000, 1001])
    assert decode_block._cache_size() == before
    assert result.tokens[0] == greedy[0][: greedy[0].index(stop) + 1]


@pytest.mark.parametrize("place, size", [(1, 3), (2, 2), (7, 5), (0, 1)])
def test_a_string_stops_at_the_token_that_completes_it(model, greedy, place, size):
    text = spell(greedy[0])
    string = text[place : place + size]
    stop = text.index(string) + size
    result = generate(model, PROMPTS[:1], stop_text=StopText(["never", string], spell))
    assert result.tokens == [greedy[0][: -(-stop // 2)]]
    assert result.texts == [text[: stop - size]]
    assert result.stop_reasons == ["stop"]


def test_strings_stop_one_sequence_and_leave_the_others_alone(model, greedy):
    string = spell(greedy[0][3:5])
    assert string not in spell(greedy[1]) + spell(greedy[2])
    result = generate(model, stop_text=StopText([string], spell))
    assert result.tokens == [greedy[0][:5], greedy[1], greedy[2]]
    assert result.stop_reasons == ["stop", "length", "length"]
    assert result.texts == [spell(greedy[0][:3]), spell(greedy[1]), spell(greedy[2])]


def test_a_string_is_passed_over_before_min_tokens():
    decode = lambda tokens: "".join(map(chr, tokens))
    tokens = [ord(c) for c in "a stop, a stop."]
    text = StopText(["stop"], decode)
    assert text.find(tokens[:6], 1) == 6
    assert text.find(tokens, len(tokens), least=7) == 14
    assert text.text(tokens[:14], least=7) == "a stop, a "
    assert text.find(tokens[:13], 13, least=7) is None
    long = [ord("x")] * 500 + tokens
    assert text.find(long, 3, least=510) == 514


@pytest.mark.parametrize(
    "strings, passed, want",
    [(["b"], 0, "a"), (["c", "ab"], 0, ""), (["b"], 2, "abca"), (["bc"], 2, "a"),
     (["x"], 0, "abcab")],
)  # fmt: skip
def test_a_text_is_cut_before_the_first_string_that_ends_behind_what_is_passed(
    strings, passed, want
):
    assert StopText(strings, spell).cut("abcab", passed) == want


def test_a_string_whose_character_takes_several_tokens_is_found():
    decode = lambda tokens: bytes(tokens).decode(errors="replace")
    tokens = list("ab😀c".encode())
    text = StopText(["😀"], decode)
    for new in range(1, len(tokens) + 1):  # wherever the block began
        assert text.find(tokens[:6], min(new, 6)) == 6
    assert text.text(tokens[:6]) == "ab"
    assert text.find(tokens[:5], 5) is None


@pytest.mark.parametrize(
    "strings, decode, message",
    [("abc", spell, "must have a list"), ([], spell, "has no strings"), ([""], spell, "has ''"),
     ([b"x"], spell, "has b'x'"), (["x"], None, "decode=None must be a function")],
)  # fmt: skip
def test_bad_stop_text_is_named(model, strings, decode, message):
    with pytest.raises(ValueError, match=f"^stop_text.*{message}"):
        generate(model, stop_text=StopText(strings, decode))


def formula_logprobs(model, tokens):
    """Log-probabilities after each of `tokens`, `[tokens, vocab]`, in numpy."""
    hidden, _ = plain_hidden(model, tokens)
    logits = (hidden @ np.asarray(model.head)).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_log_probabilities_are_those_of_the_models_own_logits(model):
    rules = Sampling(temperature=3.0, repetition_penalty=1.3, logprobs=4, prompt_logprobs=True)
    quiet = Sampling(temperature=3.0)
    result = generate(model, sampling=[rules, rules, quiet], max_tokens=[10, 6, 10])
    assert result.logprobs[2] is result.top_logprobs[2] is result.prompt_logprobs[2] is None
    for row in range(2):
        prompt, answer = PROMPTS[row], result.tokens[row]
        want = formula_logprobs(model, prompt + answer)
        own = want[np.arange(len(prompt + answer) - 1), (prompt + answer)[1:]]
        assert result.prompt_logprobs[row][0] is None
        np.testing.assert_allclose(
            np.float64(result.prompt_logprobs[row][1:]), own[: len(prompt) - 1], atol=2e-5
        )
        np.testing.assert_allclose(result.logprobs[row], own[len(prompt) - 1 :], atol=2e-5)
        for place, top in enumerate(result.top_logprobs[row]):
            here = want[len(prompt) - 1 + place]
            assert list(top) == np.argsort(-here)[:4].tolist()
            np.testing.assert_allclose(list(top.values()), here[list(top)], atol=2e-5)


def test_min_tokens_penalties_and_hooks_reach_the_loop(model, greedy):
    stop = greedy[0][0]
    ended = generate(model, PROMPTS[:1], stop_ids=[stop], sampling=Sampling(min_tokens=4))
    assert stop not in ended.tokens[0][:3] and len(ended.tokens[0]) >= 4
    once = Sampling(presence_penalty=1e9, repetition_penalty=1.0)
    assert all(len(set(tokens)) == 10 for tokens in generate(model, sampling=once).tokens)

    def counts_up(logits, tokens):
        """Token n + 1 after n tokens."""
        known = jnp.sum(tokens >= 0, axis=1, dtype=jnp.int32)
        return jnp.where(jnp.arange(logits.shape[1])[None] == known[:, None], 1.0, 0.0)

    counted = generate(model, sampling=Sampling(hook=counts_up), max_tokens=4)
    assert counted.tokens == [[len(p) + n for n in range(4)] for p in PROMPTS]


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ("a text", {}, "prompts must be a list of lists of token ids, not str"),
        (7, {}, "prompts must be a list of lists of token ids, not int"),
        ([1, 2], {}, r"prompt 0 must be a list of token ids, not int 1: one prompt alone is"),
        (["a text"], {}, "prompt 0 must be a list of token ids, not str 'a text'"),
        ([[1.0, 2.0]], {}, "prompt 0 has float 1.0, and a token id is a whole number"),
        (np.ones((1, 2), np.float32), {}, "prompt 0 has float 1.0"),
        ([[True]], {}, "prompt 0 has bool True"),
        ([[1, -1]], {}, "prompt 0 has token -1, and vocab_size=40"),
        ([[1]], dict(max_tokens=2**31), "max_tokens=2147483648 must be at most"),
        ([[1]], dict(max_tokens=True), "max_tokens=True must be"),
        ([[1]], dict(max_tokens=1.5), "max_tokens=1.5 must be"),
        ([[1]], dict(max_tokens=[1, 2]), "max_tokens has 2 entries and must have one per prompt"),
        ([[1]], dict(stop_ids=[2**31]), "stop_ids has 2147483648"),
        ([[1]], dict(stop_ids=[-1]), "stop_ids has -1"),
        ([[1]], dict(stop_ids=3), "stop_ids must be a list of token ids, not int 3"),
        ([[1]], dict(stop_ids="x"), "stop_ids must be a list of token ids, not str 'x'"),
        ([[1]], dict(seed=1.5), "seed=1.5 must be a whole number"),
        ([[1]], dict(sampling=0.7), "sampling must be a jaxkv.Sampling, not float 0.7"),
        ([[1]], dict(sampling=[Sampling()] * 2), "sampling has 2 entries"),
        ([[1]], dict(sampling=Sampling(logprobs=41)), "logprobs=41 must be at most vocab_size=40"),
        ([[1]], dict(sampling=Sampling(min_tokens=11)), "min_tokens=11 must be at most max_tok"),
        ([[1]], dict(cache=3), "cache must be a Generation.cache, not int"),
    ],
)
def test_bad_input_is_one_line(model, prompts, options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(model, prompts, **options)
    assert "\n" not in str(error.value)


def test_arrays_of_prompts_are_read(model, greedy):
    square = np.asarray([PROMPTS[0], PROMPTS[0]])
    for prompts in (square, jnp.asarray(square), [np.int64(PROMPTS[0]), tuple(PROMPTS[0])]):
        assert generate(model, prompts).tokens == [greedy[0]] * 2
