"""Fitted key means are the plain means of the keys that a model gave its cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KeysFromTable:
    """A model of two layers whose keys are looked up."""

    table: jax.Array  # [layers, vocab, kv_heads, head_dim]

    def layer_specs(self, keep):
        assert keep == jaxkv.Keep()
        return (jaxkv.LayerSpec(kv_heads=2, head_dim=4, dtype="float32"),) * 2

    def __call__(self, tokens, cache, *, backend):
        for layer in range(2):
            k = self.table[layer, tokens]
            cache, _ = cache.attend(layer, k, k, k, backend=backend)
        return None, cache


@pytest.mark.parametrize("chunk", [5, 64])
def test_means_leave_out_the_first_token(chunk):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((2, 11, 2, 4), dtype=np.float32)
    tokens = rng.integers(0, 11, 67)
    means = jaxkv.fit_key_means(KeysFromTable(jnp.asarray(table)), tokens, chunk=chunk)
    np.testing.assert_allclose(means, table[:, tokens[1:]].mean(axis=1), atol=1e-6)
    with pytest.raises(ValueError, match="^tokens has 1: at least 2 are needed.$"):
        jaxkv.fit_key_means(KeysFromTable(jnp.asarray(table)), [3])
