"""The shapes and types of a cache, for whoever plans, explains, checks or compiles for one."""

import functools

import jax
import jax.numpy as jnp

from jaxkv.cache import KVCache
from jaxkv.config import CacheConfig, check_config
from pallas_kernels.device import current_platform


def abstract_cache(config: CacheConfig) -> KVCache:
    """What `KVCache.create(config)` makes, as shapes and types: nothing is allocated.

    Key means that a codec needs are taken as given.

    Raises:
      ValueError: the configuration is not valid.
    """
    check_config(config)
    return _abstract(config, current_platform(config.platform))


@functools.lru_cache(maxsize=32)
def _abstract(config: CacheConfig, platform: str) -> KVCache:
    """`platform`, on which layouts depend, only distinguishes what is remembered."""
    del platform
    means = [jnp.zeros((spec.kv_heads, spec.head_dim)) for spec in config.layers]
    return jax.eval_shape(lambda: KVCache.create(config, key_means=means))
