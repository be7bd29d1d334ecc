"""Attention over coded pages equals the formula on fake-quantized keys and values, pair by pair.

Positions alone decide which pairs are read as codes; how many tokens a step adds must not matter.
"""

import dataclasses

import numpy as np
import pytest

from jaxkv import CacheConfig, LayerSpec
from jaxkv.codecs import codec_names, get_codec, recipe
from tests.helpers import CodedTwin

PAGE, HEAD_DIM = 8, 16
LOSSY = [name for name in codec_names() if get_codec(name).lossy]
STEPS = [
    ((37, 1, 7), None),  # several pages at once: later queries read earlier ones as codes
    ((11, 23, 1), None),
    ((1, 1, 1), None),
    ((0, 13, 8), None),
    ((5, 5, 5), (2, 0, 5)),  # drafts, partly rejected
    ((1, 1, 0), None),
    ((37, 30, 29), (20, 3, 29)),  # a chunk that completes pages and takes some of them back
    ((1, 1, 1), None),
    ((1, 1, 1), None),
    ((8, 8, 8), None),
    ((1, 1, 1), None),
]


def make_twin(
    codec, windows=(None,), *, sink_tokens=0, sink_positions="original", platform=None, **options
):
    layers = tuple(
        LayerSpec(
            kv_heads=2,
            head_dim=HEAD_DIM,
            window=window,
            sink_tokens=sink_tokens if window else 0,
            sink_positions=sink_positions if window else "original",
            codec=codec,
            dtype="float32",
        )
        for window in windows
    )
    config = CacheConfig(
        layers=layers,
        batch=3,
        max_tokens=136,
        max_new_tokens=37,
        page_size=PAGE,
        platform=platform,
    )
    return CodedTwin(config, q_heads=6, **options)


def drive(twin, steps=STEPS):
    for number, (new, accepted) in enumerate(steps):
        for got, expected in twin.step(new, accepted):
            np.testing.assert_allclose(got, expected, atol=5e-6, rtol=0, err_msg=f"step {number}")


def exact_around(name, recent_pages, sink_tokens):
    codec = get_codec(name)
    return dataclasses.replace(codec, recent_pages=recent_pages, sink_tokens=sink_tokens)


@pytest.mark.parametrize("window", [None, 43])
@pytest.mark.parametrize("name", LOSSY)
def test_every_codec_as_it_is(name, window):
    drive(make_twin(name, (window,)))


@pytest.mark.parametrize("name", ["4bit_nc", "tq2", "k8v4"])
def test_the_reference_backend(name):
    drive(make_twin(name, (43,), sinks=True, soft_cap=1.5, backend="reference"))


@pytest.mark.parametrize("name", ["4bit_nc", "tq3", "int8"])
def test_the_layout_of_another_platform(name):
    drive(make_twin(name, (43,), platform="gpu"))


@pytest.mark.parametrize(
    "recent_pages, sink_tokens, window", [(0, 3, None), (0, 11, 29), (1, 0, 29), (3, 11, None)]
)
def test_recent_and_sink_pages_are_exact(recent_pages, sink_tokens, window):
    drive(make_twin(exact_around("4bit_nc", recent_pages, sink_tokens), (window,)))


@pytest.mark.parametrize(
    "name, window, sink_tokens, codec_sinks",
    [("3bit_nc", 19, 3, 0), ("3bit_nc", 33, 11, 4), ("tq3", 33, 3, 4), ("tq3", 21, 11, 0)],
)
def test_sinks_beside_a_window(name, window, sink_tokens, codec_sinks):
    codec = dataclasses.replace(get_codec(name), sink_tokens=codec_sinks)
    drive(make_twin(codec, (window,), sink_tokens=sink_tokens, sinks=True, soft_cap=1.5))


@pytest.mark.parametrize("name", ["int8", "tq4"])
def test_sinks_are_attended_by_their_own_query(name):
    drive(make_twin(name, (33,), sink_tokens=5, sink_positions="cache"))


def test_a_window_within_the_recent_pages_is_exact():
    twin = make_twin("tq4", (2 * PAGE, 2 * PAGE + 1))
    specs = [group.spec for group in twin.config.groups]
    assert [spec.kv_codec.name for spec in specs] == ["exact", "tq4"]
    drive(twin)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [None, 27, 45])
def test_any_chunking_gives_the_same(window, seed):
    """Prefill, decode, verify with rejections and forks, in any order and of any size."""
    rng = np.random.default_rng(seed)
    name = rng.choice(["k3v4_nc", "tq4", "k8v4"])
    codec = exact_around(name, int(rng.integers(1, 4)), int(rng.choice([0, 4])))
    twin = make_twin(codec, (window,))
    for _ in range(20):
        lengths = np.asarray(twin.cache.lengths)
        if rng.integers(5) == 0:
            twin.fork(*map(int, rng.permutation(3)[:2]))
            continue
        most = rng.choice([1, 5, 37])
        new = [int(rng.integers(0, min(most, 136 - n) + 1)) for n in lengths]
        drive(twin, [(new, [int(rng.integers(n // 2, n + 1)) for n in new])])


@pytest.mark.parametrize("recent_pages", [0, 2])
def test_a_static_key_mean(recent_pages):
    codec = recipe("mine", key_bits=4, value_bits=3, key_mean="static", recent_pages=recent_pages)
    means = [np.linspace(-2, 2, 2 * HEAD_DIM, dtype=np.float32).reshape(2, HEAD_DIM)]
    drive(make_twin(codec, (43,), key_means=means))
    with pytest.raises(ValueError, match="^codec 'mine' removes a static key mean, and key_means="):
        make_twin(codec)
