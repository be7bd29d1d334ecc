"""An invalid configuration is refused by name and value; a valid one implies the stores' sizes."""

import dataclasses
import re

import jax
import pytest

from jaxkv import CacheConfig, KVCache, LayerSpec

FULL = LayerSpec(kv_heads=2, head_dim=8, dtype="float32")
WINDOWED = dataclasses.replace(FULL, window=19)


def make_config(*layers, **options):
    return CacheConfig(
        **{"layers": layers or (FULL,), "batch": 2, "max_tokens": 64, "page_size": 8} | options
    )


BAD_LAYERS = [
    (dict(kv_heads=0), "kv_heads=0 must be at least 1."),
    (dict(head_dim=-3), "head_dim=-3 must be at least 1."),
    (dict(window=0), "window=0 must be at least 1, or None for all tokens."),
    (dict(sink_tokens=-1), "sink_tokens=-1 must not be negative."),
    (dict(sink_positions="absolute"), "sink_positions='absolute': 'original' or 'cache'."),
    (
        dict(window=None, sink_positions="cache"),
        "sink_positions='cache' needs a window, and window=None.",
    ),
    (dict(dtype="float64"), "dtype='float64' must be bfloat16, float16 or float32."),
    (dict(dtype="int8"), "dtype='int8' must be bfloat16, float16 or float32."),
    (dict(dtype="float"), "dtype='float' must be bfloat16, float16 or float32."),
]
BAD_CACHES = [
    (dict(layers=()), "layers=() must name at least one layer."),
    (dict(batch=0), "batch=0 must be at least 1."),
    (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1."),
    (dict(page_size=-8), "page_size=-8 must be at least 1."),
    (dict(max_tokens=0), "max_tokens=0 must be at least 1."),
    (dict(max_tokens=None), "max_tokens=None needs a window in every layer."),
    (dict(pages=1), "pages=1 must be at least 2."),
]


@pytest.mark.parametrize("changes, message", BAD_LAYERS)
def test_bad_layer_is_named_in_one_line(changes, message):
    spec = lambda: dataclasses.replace(WINDOWED, **changes)  # a wrong dtype raises here already
    for refuses in (lambda: spec().checked(), lambda: KVCache.create(make_config(FULL, spec()))):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            refuses()


@pytest.mark.parametrize("changes, message", BAD_CACHES)
def test_bad_cache_is_named_in_one_line(changes, message):
    config = make_config(FULL, WINDOWED, **changes)
    for refuses in (config.checked, lambda: KVCache.create(config)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            refuses()


def test_codec_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="^codec 'fp8' is unknown; there are exact, int8, "):
        KVCache.create(make_config(dataclasses.replace(FULL, codec="fp8")))


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_that_is_not_there_is_named(layer):
    with pytest.raises(ValueError, match=f"^layer={layer} must be a whole number below 3.$"):
        make_config(FULL, WINDOWED, FULL).locate(layer)


def test_equal_layers_share_a_group():
    config = make_config(WINDOWED, FULL, WINDOWED, dataclasses.replace(FULL, head_dim=4))
    assert [group.layers for group in config.groups] == [(0, 2), (1,), (3,)]
    assert [config.locate(layer) for layer in range(4)] == [(0, 0), (1, 0), (0, 1), (2, 0)]


@pytest.mark.parametrize("n, page_size, window", [(1, 8, 19), (1, 8, 1), (13, 8, 16), (64, 4, 7)])
def test_ring_holds_the_window_and_the_newest_step_at_any_alignment(n, page_size, window):
    spec = dataclasses.replace(FULL, window=window)
    config = make_config(spec, max_tokens=None, max_new_tokens=n, page_size=page_size)
    most = 0
    for start in range(page_size):  # start of the window of the step's first token
        most = max(most, len({j // page_size for j in range(start, start + window - 1 + n)}))
    (store,) = config.stores
    assert store.width == most == -(-(window + n - 2) // page_size) + 1


def test_sinks_have_whole_pages_beside_the_ring():
    spec = dataclasses.replace(WINDOWED, sink_tokens=9)
    (store,) = make_config(spec, batch=3, max_tokens=None, max_new_tokens=5).stores
    assert (store.width, store.span.sink_pages) == (4, 2)
    assert store.pages == 1 + 3 * (4 + 2)


def test_without_a_window_sinks_are_ordinary_tokens():
    (store,) = make_config(dataclasses.replace(FULL, sink_tokens=9), max_tokens=61).stores
    assert (store.width, store.span.sink_pages) == (8, 0)


@pytest.mark.parametrize("sink_tokens, width, sink_pages", [(0, 3, 0), (9, 1, 2), (50, 1, 3)])
def test_tables_are_no_wider_than_the_longest_sequence(sink_tokens, width, sink_pages):
    spec = dataclasses.replace(WINDOWED, window=999, sink_tokens=sink_tokens)
    (store,) = make_config(spec, max_tokens=20).stores
    assert (store.width, store.span.sink_pages) == (width, sink_pages)


def test_pages_caps_every_pool():
    config = make_config(FULL, WINDOWED, batch=2, pages=9)
    assert [store.pages for store in config.stores] == [9, 9]
    assert [store.pages for store in dataclasses.replace(config, pages=99).stores] == [17, 9]


def test_configuration_is_static_and_hashable():
    config = make_config(FULL, WINDOWED)
    twin = make_config(dataclasses.replace(FULL), dataclasses.replace(WINDOWED))
    assert hash(config) == hash(twin) and config == twin
    cache = KVCache.create(config)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cache))
    traces = []
    count = jax.jit(lambda cache: traces.append(cache.config))
    count(cache), count(KVCache.create(twin))
    assert traces == [config.checked()]
