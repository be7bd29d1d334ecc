"""Experts are held to a plain float64 loop over tokens and their chosen experts."""

import dataclasses
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.experts import Experts, ExpertsConfig
from tests.helpers import AS_USERS

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
BIASES = ("router_bias", "gate_up_bias", "down_bias")
OSS = {"up_offset": 1.0, "biases": True, "packed": True}
SIX = ExpertsConfig(experts=6, top_k=3, alpha=1.702, limit=1.5, **OSS)
FIVE = ExpertsConfig(experts=5, top_k=1, alpha=1.3, limit=0.7, **OSS)


def make(config, *, hidden=64, inner=96, stack=(), dtype="float32", seed=0):
    """Experts with random weights, biases included."""
    module = Experts(config, hidden, inner, nnx.Rngs(seed), stack=stack, dtype=dtype)
    rng = np.random.default_rng(seed)
    for name in BIASES if config.biases else ():
        parameter = getattr(module, name)
        noise = rng.standard_normal(parameter.shape) * 0.5
        setattr(module, name, parameter.replace(jnp.asarray(noise, dtype)))
    return module


def tokens_for(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layer_weights(module, layer=None):
    """A module's weights in float64 as `[in, out]` matrices, unpacked by a table."""

    def pick(name):
        value = np.asarray(getattr(module, name)[...])
        return value if layer is None else value[layer]

    own = ("router", *BIASES) if module.config.biases else ("router",)
    weights = {name: pick(name).astype(np.float64) for name in own}
    if not module.config.biases:
        weights |= {"router_bias": 0.0} | {name: defaultdict(float) for name in BIASES[1:]}
    for name in ("gate_up", "down"):
        if module.config.packed:
            blocks, scales = pick(name + "_blocks"), pick(name + "_scales")
            codes = np.stack([blocks % 16, blocks // 16], axis=-1)
            values = E2M1[codes % 8] * np.where(codes >= 8, -1, 1)
            values = values.reshape(*scales.shape, 32) * 2.0 ** (scales[..., None] - 127.0)
            weights[name] = values.reshape(*scales.shape[:-1], -1).swapaxes(1, 2)
        else:
            weights[name] = pick(name).astype(np.float64)
    return weights


def plain(config, weights, x):
    """The mixture, token by token."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    limit = np.inf if config.limit is None else config.limit
    for row, token in enumerate(x):
        logits = token @ weights["router"] + weights["router_bias"]
        chosen = np.argsort(-logits, kind="stable")[: config.top_k]
        share = np.exp(logits - logits.max())
        share /= share[chosen].sum() if config.shares == "chosen" else share.sum()
        for expert in chosen:
            y = token @ weights["gate_up"][expert] + weights["gate_up_bias"][expert]
            gate, up = np.minimum(y[0::2], limit), np.clip(y[1::2], -limit, limit)
            y = gate / (1 + np.exp(-config.alpha * gate)) * (up + config.up_offset)
            y = y @ weights["down"][expert] + weights["down_bias"][expert]
            out[row] += share[expert] * y
    return out


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("config", [SIX, FIVE])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 5), (1, 37), (2, 64)])
def test_equals_a_plain_loop(config, packed, shape):
    config = dataclasses.replace(config, packed=packed)
    module = make(config)
    x = tokens_for(*shape, 64)
    expected = plain(config, layer_weights(module), x.reshape(-1, 64)).reshape(x.shape)
    np.testing.assert_allclose(jax.jit(module)(x), expected, atol=1e-5)


@pytest.mark.parametrize("shares", ["chosen", "all"])
@pytest.mark.parametrize("packed", [True, False])
def test_silu_experts_without_biases_equal_a_plain_loop(shares, packed):
    config = ExpertsConfig(experts=7, top_k=3, shares=shares, packed=packed)
    module, x = make(config), tokens_for(1, 19, 64)
    assert module.router_bias is module.gate_up_bias is module.down_bias is None
    expected = plain(config, layer_weights(module), x[0])
    np.testing.assert_allclose(jax.jit(module)(x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 64, 65])
def test_all_tokens_may_need_the_same_experts(tokens):
    """Blocks that are full, one over, and one under."""
    module = make(SIX)
    module.router_bias = module.router_bias.replace(jnp.array([0.0, 90, 0, 80, 0, 70]))
    x = tokens_for(1, tokens, 64)
    expected = plain(SIX, layer_weights(module), x[0])
    np.testing.assert_allclose(module(x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_experts_larger_than_a_tile(packed, monkeypatch):
    monkeypatch.setattr("models.experts.CPU_TILE", 40)  # divides neither 64 nor 192
    config = dataclasses.replace(SIX, packed=packed)
    module, x = make(config), tokens_for(1, 7, 64)
    expected = plain(config, layer_weights(module), x[0])
    np.testing.assert_allclose(module(x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_experts_that_no_token_needs_are_not_read(packed):
    config = dataclasses.replace(SIX, packed=packed)
    module, x = make(config), tokens_for(1, 33, 64)
    module.router_bias = module.router_bias.replace(jnp.array([9.0, -99, 9, 9, -99, 9]))
    clean = module(x)
    for name in ("gate_up", "down"):
        for part, bad in (("_scales", 255) if packed else ("", jnp.nan), ("_bias", jnp.nan)):
            weight = getattr(module, name + part)
            poisoned = weight[...].at[jnp.array([1, 4])].set(bad)
            setattr(module, name + part, weight.replace(poisoned))
    np.testing.assert_array_equal(module(x), clean)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("packed", [True, False])
def test_a_bad_row_stays_alone(packed, bad):
    module = make(dataclasses.replace(SIX, packed=packed))
    x = tokens_for(1, 21, 64)
    others = np.delete(np.arange(21), 10)
    dirty = module(x.at[0, 10].set(bad))
    assert not np.isfinite(dirty[0, 10]).any()
    np.testing.assert_allclose(dirty[0, others], module(x)[0, others], atol=1e-6)


def test_equal_logits_choose_the_first_experts():
    module, x = make(SIX), tokens_for(1, 4, 64)
    module.router = module.router.replace(jnp.zeros_like(module.router[...]))
    module.router_bias = module.router_bias.replace(jnp.zeros(6))
    module.gate_up_bias = module.gate_up_bias.replace(
        module.gate_up_bias[...].at[3:].set(jnp.nan)  # experts 3 to 5 tie with 0 to 2, and lose
    )
    assert np.isfinite(module(x)).all()


@pytest.mark.parametrize("packed", [True, False])
def test_stacked_layers_are_picked_by_index(packed):
    config = dataclasses.replace(SIX, packed=packed)
    module, x = make(config, stack=(3,)), tokens_for(1, 5, 64)
    run = jax.jit(lambda module, x, layer: module(x, layer))
    for layer in range(3):
        expected = plain(config, layer_weights(module, layer), x[0])
        np.testing.assert_allclose(run(module, x, layer)[0], expected, atol=1e-5)


def test_bfloat16_is_float32_rounded():
    module, x = make(SIX, dtype="bfloat16"), tokens_for(2, 9, 64).astype(jnp.bfloat16)
    expected = plain(SIX, layer_weights(module), x.reshape(-1, 64)).reshape(x.shape)
    out = module(x)
    assert out.dtype == jnp.bfloat16
    # each expert's activation and output are rounded to 8 bits
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)


@pytest.mark.parametrize(("packed", "tokens"), [(True, 1), (True, 32), (False, 1), (False, 32)])
def test_a_scan_over_layers_copies_and_unpacks_no_layer(packed, tokens):
    """Only a few tiles of one expert are ever outside the parameters."""
    config = ExpertsConfig(experts=32, top_k=4, alpha=1.702, limit=7.0, packed=packed)
    hidden, inner = 256, 320
    build = lambda: Experts(config, hidden, inner, nnx.Rngs(0), stack=(4,), dtype="float32")
    graph, weights = nnx.split(nnx.eval_shape(build))

    def run(weights, x):
        layer = lambda x, i: (x + nnx.merge(graph, weights)(x, i), None)
        return jax.lax.scan(layer, x, jnp.arange(4))[0]

    x = jax.ShapeDtypeStruct((1, tokens, hidden), jnp.float32)
    compiled = jax.jit(run).lower(weights, x).compile(AS_USERS)
    values = 3 * hidden * inner * 4  # bytes of one expert, unpacked
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * values < 32 * values / 8


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="top_k=7 must be 1 to experts=6"):
        dataclasses.replace(SIX, top_k=7)
    with pytest.raises(ValueError, match="hidden=48 .* multiples of 32"):
        make(SIX, hidden=48)
    with pytest.raises(ValueError, match="layer=1 must be given for stacked"):
        make(SIX)(tokens_for(1, 1, 64), 1)
    with pytest.raises(ValueError, match="layer=None must be given for stacked"):
        make(SIX, stack=(2,))(tokens_for(1, 1, 64))


@pytest.mark.parametrize("packed", [True, False])
def test_jax_with_64_bits_gives_the_same(packed):
    """Loops then count in 64 bits, and places of slices must be of one type."""
    module, x = make(dataclasses.replace(SIX, packed=packed)), tokens_for(1, 5, 64)
    expected = module(x)
    with jax.enable_x64(True):
        out = module(x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=1e-6)
