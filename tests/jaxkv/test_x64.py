"""The cache works, and means the same, where JAX has 64-bit types."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import jaxkv
from jaxkv import CacheConfig, KVCache, LayerSpec

spec = lambda **options: LayerSpec(kv_heads=1, head_dim=64, dtype="float32", **options)
layers = (spec(window=5, sink_tokens=2), spec(codec="int8"), spec(codec="tq4"))
config = CacheConfig(layers=layers, batch=2, max_tokens=64, max_new_tokens=9, page_size=4)

@jax.jit
def step(cache, new, x):
    cache = cache.prepare(new)
    outs = []
    for layer in range(3):
        cache, out = cache.attend(layer, x, x, x)
        outs.append(out)
    return cache.commit(cache.pending), jnp.stack(outs)

cache = KVCache.create(config)
kinds = jax.tree.map(lambda x: x.dtype, cache)
rng = np.random.default_rng(0)
for new in ([9, 3], [9, 9], [7, 0]):
    x = rng.standard_normal((2, 9, 1, 64), np.float32)
    cache, out = step(cache, jnp.asarray(new), jnp.asarray(x))
cache = jax.jit(KVCache.fork)(cache, jnp.asarray(0), jnp.asarray(1))
assert jax.tree.map(lambda x: x.dtype, cache) == kinds
jaxkv.check(cache)
assert out.dtype == jnp.float32
wide = jax.jit(lambda c, x: c.prepare([1, 1]).attend(0, x, x, x)[1])(cache, jnp.ones((2, 1, 1, 64)))
assert wide.dtype == (jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
many = cache.prepare(jnp.asarray(np.int64([2**31 + 1, 1]))) if jax.config.jax_enable_x64 else None
assert many is None or many.too_long.tolist() == [True, False]
assert jaxkv.plan(config).total == cache.bytes_reserved
print(cache.lengths.tolist(), np.asarray(out, np.float32).tobytes().hex())
"""


def run(x64: str) -> str:
    environment = os.environ | {"JAX_ENABLE_X64": x64, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_steps_with_64_bit_types_give_the_same_numbers():
    assert run("1") == run("0")
