"""Experts are held to a plain float64 loop over tokens and their chosen experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.experts import Experts, ExpertsConfig

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SIX = ExpertsConfig(experts=6, top_k=3, alpha=1.702, limit=1.5, packed=True)
FIVE = ExpertsConfig(experts=5, top_k=1, alpha=1.3, limit=0.7, packed=True)


def make(config, *, hidden=64, inner=96, stack=(), dtype="float32", seed=0):
    """Experts with random weights, biases included."""
    module = Experts(config, hidden, inner, nnx.Rngs(seed), stack=stack, dtype=dtype)
    rng = np.random.default_rng(seed)
    for name in ("router_bias", "gate_up_bias", "down_bias"):
        parameter = getattr(module, name)
        noise = rng.standard_normal(parameter.shape) * 0.5
        setattr(module, name, parameter.replace(jnp.asarray(noise, dtype)))
    return module


def tokens_for(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layer_weights(module, layer=None):
    """A module's weights in float64 as `[in, out]` matrices, unpacked by a table."""
    pick = lambda name: np.asarray(
        getattr(module, name)[...] if layer is None else getattr(module, name)[...][layer]
    )
    weights = {
        name: pick(name).astype(np.float64)
        for name in ("router", "router_bias", "gate_up_bias", "down_bias")
    }
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
    """gpt-oss's mixture, token by token."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for row, token in enumerate(x):
        logits = token @ weights["router"] + weights["router_bias"]
        chosen = np.argsort(-logits, kind="stable")[: config.top_k]
        share = np.exp(logits[chosen] - logits[chosen].max())
        for expert, p in zip(chosen, share / share.sum(), strict=True):
            y = token @ weights["gate_up"][expert] + weights["gate_up_bias"][expert]
            gate = np.minimum(y[0::2], config.limit)
            up = np.clip(y[1::2], -config.limit, config.limit)
            y = gate / (1 + np.exp(-config.alpha * gate)) * (up + 1)
            out[row] += p * (y @ weights["down"][expert] + weights["down_bias"][expert])
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
