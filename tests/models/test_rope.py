"""Rotation angles at far positions and the published frequency scalings, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import CheckpointError
from models.families.architectures import architecture_config
from models.rope import angles, make_rope, rotate
from tests.models import numpy_llama, numpy_mixed
from tests.models.numpy_llama import make_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAR = 10_000_000


def positions(rng, count=4000):
    """Random ones of every magnitude, with digit boundaries of base 256 and the ends."""
    spread = np.exp(rng.uniform(0, np.log(FAR), count)).astype(np.int64)
    edges = [256**power + shift for power in (1, 2) for shift in (-1, 0, 1)]
    return np.concatenate([[0, 1, FAR - 1, FAR], edges, rng.integers(0, FAR, count), spread])


@pytest.mark.parametrize("theta", [500.0, 10_000.0, 1e6])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_angles_stay_within_a_milliradian_up_to_ten_million(head_dim, theta):
    position = positions(np.random.default_rng(head_dim))
    rope = make_rope(head_dim, {"rope_theta": theta})
    assert len(rope.frequencies) == head_dim // 2
    cos, sin = jax.jit(lambda p: angles(rope, p))(jnp.asarray(position, jnp.int32))
    exact = np.outer(position.astype(np.float64), theta ** (-np.arange(0, head_dim, 2) / head_dim))
    found = np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64))
    error = np.abs(np.angle(np.exp(1j * (found - exact))))
    assert error.max() < 1e-3


def test_angles_keep_the_shape_of_positions():
    cos, sin = angles(make_rope(6, {"rope_theta": 100.0}), jnp.zeros((2, 5), jnp.int32))
    assert cos.shape == sin.shape == (2, 5, 3)
    np.testing.assert_array_equal(cos, 1)
    np.testing.assert_array_equal(sin, 0)


def test_a_pair_is_a_channel_and_the_one_half_a_head_on():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    quarter = (jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2)))
    np.testing.assert_allclose(rotate(x, quarter)[0, 0, 0], [-3.0, -4.0, 1.0, 2.0])


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_theta": None},  # 10000
        {"rope_theta": 700.0},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 700.0}},  # the new key has precedence
        {"rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 700.0}},
        {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}},
        {"rope_parameters": {**LLAMA3, "factor": 32.0, "rope_theta": 500_000.0}},
    ],
)
def test_config_gives_the_published_frequencies(keys):
    config = make_config(head_dim=64, **keys)
    found = architecture_config(config).rope.frequencies
    np.testing.assert_allclose(found, numpy_llama.frequencies(config), rtol=1e-12)


def test_llama3_keeps_short_wavelengths_stretches_long_and_mixes_between():
    plain = np.array(make_rope(128, {"rope_theta": 5e5}).frequencies)
    scaled = np.array(make_rope(128, {"rope_theta": 5e5, **LLAMA3}).frequencies)
    kind = np.digitize(2 * np.pi / plain, [8192 / 4, 8192 / 1])
    assert set(kind) == {0, 1, 2}
    np.testing.assert_allclose(scaled[kind == 0], plain[kind == 0])
    np.testing.assert_allclose(scaled[kind == 2], plain[kind == 2] / 8)
    assert np.all((scaled < plain) & (scaled > plain / 8) == (kind == 1))


def test_factors_divide_each_frequency():
    rope = make_rope(4, {"rope_type": "factors", "rope_theta": 100.0, "factors": [1.0, 4.0]})
    np.testing.assert_allclose(rope.frequencies, [1.0, 0.1 / 4])


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "Default", None, 3])
def test_unknown_type_raises(kind):
    with pytest.raises(ValueError, match="rope_type="):
        make_rope(8, {"rope_type": kind, "rope_theta": 1e4})


@pytest.mark.parametrize("missing", [key for key in LLAMA3 if key != "rope_type"])
def test_missing_parameter_is_named(missing):
    parameters = {key: value for key, value in LLAMA3.items() if key != missing}
    with pytest.raises(ValueError, match=missing):
        make_rope(8, {**parameters, "rope_theta": 1e4})
    with pytest.raises(CheckpointError, match=missing):
        architecture_config(make_config(rope_scaling=parameters))


YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize("change", [{}, {"factor": 4.0}, {"beta_fast": 8.0}, {"beta_slow": 3.0}])
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("head_dim", [16, 64, 90])
def test_yarn_gives_the_papers_frequencies(head_dim, truncate, change):
    parameters = YARN | {"truncate": truncate} | change
    rope = make_rope(head_dim, parameters)
    plain = lambda theta: np.array([theta ** (-2 * c / head_dim) for c in range(head_dim // 2)])
    expected, scale = numpy_mixed.yarn(parameters, plain, head_dim)
    np.testing.assert_allclose(rope.frequencies, expected, rtol=1e-12)
    assert rope.scale == pytest.approx(scale)


def test_yarn_keeps_fast_channels_and_stretches_slow_ones():
    plain = np.array(make_rope(64, {"rope_theta": 150_000.0}).frequencies)
    scaled = np.array(make_rope(64, YARN).frequencies)
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 60], plain[turns > 60])
    np.testing.assert_allclose(scaled[turns < 0.5], plain[turns < 0.5] / 32)
    assert np.all(np.diff(scaled / plain) <= 0)


@pytest.mark.parametrize(
    "keys, scale",
    [
        ({}, 0.1 * np.log(32) + 1),
        ({"factor": 0.5}, 1.0),  # nothing is stretched
        ({"attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 1.0}, 1.5),
        ({"mscale": 0.7, "mscale_all_dim": 0.7}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * np.log(32) + 1) / (0.1 * np.log(32) + 1)),
        ({"mscale": 2.0, "mscale_all_dim": 0}, 0.1 * np.log(32) + 1),
        ({"attention_factor": None, "beta_fast": None, "beta_slow": None}, 0.1 * np.log(32) + 1),
    ],
)
def test_yarn_scales_cosine_and_sine(keys, scale):
    rope = make_rope(16, YARN | keys)
    cos, sin = angles(rope, jnp.arange(300, dtype=jnp.int32)[None])
    np.testing.assert_allclose(np.hypot(cos, sin), scale, rtol=1e-5)
