"""Attention through the cache equals the dense formula on the whole history."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import CacheConfig, KVCache, LayerSpec
from tests.helpers import TOLERANCE, Twin

PAGE = 8
# Each step's new tokens: prefill in uneven chunks, decode, verify; lengths 1, page +- 1.
STEPS = [
    ((13, 1, 7), None),
    ((11, 13, 1), None),
    ((1, 1, 1), None),
    ((0, 13, 8), None),
    ((5, 5, 5), (2, 0, 5)),  # drafts, partly rejected
    ((1, 1, 0), None),
    ((13, 3, 13), (13, 3, 12)),
    ((1, 1, 1), None),
    ((1, 1, 1), None),
]


def make_twin(windows, *, sink_tokens=0, sink_positions="original", dtype="float32", **options):
    layers = tuple(
        LayerSpec(
            kv_heads=2,
            head_dim=20,
            window=window,
            sink_tokens=sink_tokens if window else 0,
            sink_positions=sink_positions if window else "original",
            dtype=dtype,
        )
        for window in windows
    )
    config = CacheConfig(layers=layers, batch=3, max_tokens=80, max_new_tokens=13, page_size=PAGE)
    return Twin(config, q_heads=6, **options)


def drive(twin, steps=STEPS):
    tolerance = TOLERANCE[twin.config.layers[0].dtype]
    for new, accepted in steps:
        for got, expected in twin.step(new, accepted):
            np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("sink_tokens", [0, 3, 11])
@pytest.mark.parametrize("window", [None, 1, 5, 19])
def test_cached_attention_equals_dense(window, sink_tokens, backend):
    drive(make_twin([window], sink_tokens=sink_tokens, backend=backend))


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("sink_tokens", [3, 8, 11])
def test_sinks_are_attended_by_their_own_query(sink_tokens, backend):
    twin = make_twin([19], sink_tokens=sink_tokens, sink_positions="cache", backend=backend)
    drive(twin)


@pytest.mark.parametrize("window", [None, 19])
def test_learned_sinks_and_soft_cap(window):
    drive(make_twin([window], sink_tokens=3, sinks=True, soft_cap=1.5))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_pages(dtype):
    drive(make_twin([None, 19], dtype=dtype))


def test_groups_of_different_windows_share_a_cache():
    twin = make_twin([5, None, 19, 5], sink_tokens=3, sinks=True)
    assert [group.layers for group in twin.config.groups] == [(0, 3), (1,), (2,)]
    drive(twin)


def test_window_as_long_as_the_sequence_equals_no_window():
    full, windowed = make_twin([None]), make_twin([200])
    for new, accepted in STEPS:
        for (a, _), (b, _) in zip(
            full.step(new, accepted), windowed.step(new, accepted), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_padding_rows_are_exactly_zero():
    twin = make_twin([None], sinks=True)
    twin.step((13, 1, 7))
    spec = twin.config.layers[0]
    q = twin.random(3, 4, 6, spec.head_dim)
    k = twin.random(3, 4, 2, spec.head_dim)
    attend = jax.jit(lambda cache, counts: cache.prepare(counts).attend(0, q, k, k)[1])
    out = attend(twin.cache, jnp.asarray([2, 0, 1], jnp.int32))
    rows = np.abs(np.asarray(out)).max(axis=(2, 3)) > 0
    np.testing.assert_array_equal(rows, [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])


def test_bad_calls_name_the_value():
    spec = LayerSpec(kv_heads=2, head_dim=8, dtype="float32")
    cache = KVCache.create(CacheConfig(layers=(spec,), batch=1, max_tokens=16, max_new_tokens=2))
    cache = cache.prepare(jnp.int32([1]))
    q, k = jnp.zeros((1, 3, 4, 8)), jnp.zeros((1, 3, 2, 8))
    with pytest.raises(ValueError, match="tokens=3 must be at most"):
        cache.attend(0, q, k, k)
    with pytest.raises(ValueError, match="q_sink is not taken"):
        cache.attend(0, q[:, :1], k[:, :1], k[:, :1], q_sink=q[:, :1])
    with pytest.raises(NotImplementedError, match="backend='gpu' needs an NVIDIA GPU, and"):
        cache.attend(0, q[:, :1], k[:, :1], k[:, :1], backend="gpu")
    with pytest.raises(ValueError, match="q_heads=3 must be a multiple"):
        cache.attend(0, q[:, :1, :3], k[:, :1], k[:, :1])
