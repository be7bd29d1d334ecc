"""Generation through the cache: an uncached model's tokens, whatever the batch and the pages."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
import models
from jaxkv import Keep, Sizes
from jaxkv.request import prompt_seeds
from jaxkv.sizes import default_chunk

pytestmark = pytest.mark.both_pythons

ORACLES = Path(__file__).parents[1] / "oracles"
PROMPTS = [[5, 9, 200, 3], [17], list(range(20, 61))]
HOT = jaxkv.Sampling(temperature=1.5, top_k=50)


@pytest.fixture(autouse=True)
def loose_promotion():
    """Models follow their checkpoints' dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def model():
    """A tiny Llama with random weights; logits differ enough that greedy tokens are distinct."""
    with jax.numpy_dtype_promotion("standard"):
        return models.load(ORACLES / "llama", dtype="float32", scan=True)


def generate(model, prompts, **options):
    """`jaxkv.generate` in small sizes, which may be given by name."""
    return jaxkv.generate(model, prompts, **small(options))


def small(options):
    """Options with `Sizes` of their own, small ones where they name none."""
    names = [field.name for field in dataclasses.fields(Sizes)]
    given = {name: options.pop(name) for name in names if name in options}
    sizes = Sizes(**(dict(page_size=8, chunk=16, block=5) | given))
    return dict(max_tokens=12, stop_ids=(), sizes=sizes) | options


@jax.jit
def last_logits(model, tokens, count):
    """Logits after the first `count` of `tokens`, by one prefill of a fresh cache."""
    layers = model.layer_specs(Keep(dtype="float32"))
    size = tokens.shape[1]
    config = jaxkv.CacheConfig(layers=layers, batch=1, max_tokens=size, max_new_tokens=size)
    cache = jaxkv.KVCache.create(config).prepare(count[None])
    hidden, _ = model(tokens, cache)
    return model.unembed(hidden)[0, count - 1]


def uncached(model, prompt, count):
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        tokens[0, end] = int(last_logits(model, tokens, jnp.int32(end)).argmax())
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


def test_cached_tokens_equal_uncached_ones_in_any_batch(model):
    expected = [uncached(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    result = generate(model, PROMPTS)
    assert result.tokens == expected
    assert result.stop_reasons == ["length"] * 3
    assert [generate(model, [prompt]).tokens[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("options", [dict(chunk=3), dict(page_size=64), dict(block=1)])
def test_chunks_pages_and_blocks_do_not_change_tokens(model, options):
    assert generate(model, PROMPTS, **options).tokens == generate(model, PROMPTS).tokens


def test_unrolled_layers_give_the_same_tokens(model):
    unrolled = models.load(ORACLES / "llama", dtype="float32", scan=False)
    assert generate(unrolled, PROMPTS).tokens == generate(model, PROMPTS).tokens


def test_stop_tokens_end_one_sequence_and_are_its_last(model):
    free = generate(model, PROMPTS).tokens
    stop = free[0][4]
    result = generate(model, PROMPTS, stop_ids=[stop, 255])
    for got, full, reason in zip(result.tokens, free, result.stop_reasons, strict=True):
        cut = full.index(stop) + 1 if stop in full else len(full)
        assert got == full[:cut]
        assert reason == ("stop" if stop in full else "length")
    assert result.stop_reasons[0] == "stop"


def test_one_token_is_enough(model):
    result = generate(model, PROMPTS, max_tokens=1)
    assert [len(tokens) for tokens in result.tokens] == [1, 1, 1]
    assert result.decode_steps == 1


def test_a_starved_sequence_waits_for_pages(model):
    # Three sequences of 10 + 12 tokens want three pages of 8 each; the pool has 7.
    prompts = [list(range(n, n + 10)) for n in (3, 40, 90)]
    free = generate(model, prompts, sampling=HOT)  # a step that waits must not count as a draw
    tight = generate(model, prompts, sampling=HOT, pages=8)
    assert tight.decode_steps > free.decode_steps
    assert tight.tokens == free.tokens
    assert tight.stop_reasons == ["length"] * 3


def test_sequences_that_all_wait_end_as_no_pages(model):
    prompts = [list(range(n, n + 8)) for n in (3, 40)]
    result = generate(model, prompts, pages=3)  # two pages, both full after the prompts
    assert result.stop_reasons == ["no_pages", "no_pages"]
    assert [len(tokens) for tokens in result.tokens] == [1, 1]


@pytest.mark.parametrize("order", [(1,), (2, 0), (1, 2, 0)])
def test_a_request_draws_the_same_tokens_in_any_batch_and_row(model, order):
    seeds = (7, 7, 2**32 - 1)
    together = generate(model, PROMPTS, seed=seeds, sampling=HOT).tokens
    prompts, own = [PROMPTS[n] for n in order], [seeds[n] for n in order]
    assert generate(model, prompts, seed=own, sampling=HOT).tokens == [together[n] for n in order]


def test_draws_follow_the_seed_and_not_the_blocks(model):
    first = generate(model, PROMPTS, seed=1, sampling=HOT).tokens
    assert generate(model, PROMPTS, seed=1, sampling=HOT, block=3).tokens == first
    assert generate(model, PROMPTS, seed=9, sampling=HOT).tokens != first


def test_one_seed_counts_up_over_the_prompts(model):
    last = 2**32 - 1
    assert prompt_seeds(last - 1, 3) == [last - 1, last, 0]
    assert prompt_seeds(np.asarray([4, 4]), 2) == [4, 4]
    same = PROMPTS[2:] * 3
    counted = generate(model, same, seed=last - 1, sampling=HOT).tokens
    assert counted == generate(model, same, seed=[last - 1, last, 0], sampling=HOT).tokens
    assert len({tuple(tokens) for tokens in counted}) == 3


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 256]], {}, "prompt 0 has token 256, and vocab_size=256"),
        ([[1] * 2000], dict(max_tokens=100), "prompt 0 has 2000 tokens, with max_tokens=100 more"),
        ([[1]], dict(max_tokens=0), "max_tokens=0 must be at least 1"),
        ([[1] * 40], dict(pages=3), "do not fit pools of .2. pages"),
        ([[1]], dict(block=0), "block=0 must be at least 1"),
        ([[1]], dict(chunk=0), "chunk=0 must be at least 1"),
        ([[1]], dict(page_size=0), "page_size=0 must be at least 1"),
        ([[1]], dict(seed=-1), "seed=-1 must be a whole number, at least 0, below"),
        ([[1], [2]], dict(seed=[1, 2**32]), "seed=4294967296 must be a whole number, at least 0"),
        ([[1], [2]], dict(seed=[1]), "seed has 1 entries and must have one per prompt, 2"),
        ([[1]], dict(keep=Keep(sink_tokens=4)), "sink_tokens=4 needs a window"),
        ([[1]], dict(keep=Keep(window=0)), "window=0 must be at least 1"),
        ([[1]], dict(keep=Keep(window=8, sink_positions="near")), "sink_positions='near'"),
    ],
)
def test_bad_input_is_one_line(model, prompts, options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(model, prompts, **options)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("sink_positions", ["original", "cache"])
def test_a_long_stream_runs_in_constant_pages(model, sink_positions):
    keep = Keep(window=64, sink_tokens=4, sink_positions=sink_positions)
    stream = dict(keep=keep, page_size=16, block=500)
    short = generate(model, PROMPTS[:1], max_tokens=1000, **stream)
    long = generate(model, PROMPTS[:1], max_tokens=20000, **stream)
    assert len(long.tokens[0]) == 20000
    assert long.bytes_peak == short.bytes_peak
    assert long.bytes_reserved == short.bytes_reserved
    assert long.tokens[0][:1000] == short.tokens[0]


def test_few_prompts_take_longer_chunks_on_accelerators():
    chunks = [default_chunk(n, None, "gpu") for n in (1, 2, 3, 4, 64)]
    assert chunks == [1024, 512, 320, 256, 256]
    assert default_chunk(1, 99, "gpu") == default_chunk(1, None, "cpu") == 256


def test_the_peak_counts_the_pages_of_a_prefill_chunk(model):
    result = generate(model, [[1] * 65], keep=Keep(window=16), max_tokens=1, chunk=64)
    per_page = 2 * 8 * 16 * 2 * 4 * 3  # keys and values, tokens, head_dim, kv_heads, bytes, layers
    assert result.bytes_peak == 8 * per_page  # the window alone is three pages


def test_plan_predicts_bytes_and_explain_names_backends(model):
    for keep in (Keep(), Keep(window=24), Keep(window=24, sink_tokens=5, dtype="bfloat16")):
        layers = model.layer_specs(keep)
        mixed = layers + tuple(dataclasses.replace(s, window=None, sink_tokens=0) for s in layers)
        config = jaxkv.CacheConfig(layers=mixed, batch=3, max_tokens=100, page_size=8)
        cache = jaxkv.KVCache.create(config)
        live = [
            sum(x.nbytes for n in group.stores for x in jax.tree.leaves(cache.stores[n]))
            for group in cache.config.groups
        ]
        plan = jaxkv.plan(config)
        assert list(plan.groups) == live
        assert plan.total == cache.bytes_reserved
        report = jaxkv.explain(config, platform="cpu")
        assert [group.bytes for group in report] == live
        assert sorted(n for group in report for n in group.layers) == list(range(len(mixed)))
        assert all(group.attention == "xla" for group in report)
        with pytest.raises(NotImplementedError, match="no 'tpu' backend"):
            jaxkv.explain(config, backend="tpu")


def test_generation_matches_the_published_logits_of_its_prompt(model):
    stored = np.load(ORACLES / "llama" / "io.npz")
    assert json.loads((ORACLES / "llama" / "config.json").read_text())["vocab_size"] == 256
    prompt, logits = stored["input_ids"][0], stored["logits"][0]
    result = generate(model, [prompt.tolist()], max_tokens=1)
    assert result.tokens == [[int(logits[-1].argmax())]]
