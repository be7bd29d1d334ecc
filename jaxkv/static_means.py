"""The static key means of a cache's codecs, as its stores keep them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.config import CacheConfig, LayerGroup
from pallas_kernels.checks import shown


def static_means(
    config: CacheConfig, key_means: Sequence[jax.Array] | None
) -> list[jax.Array | None]:
    """The static means of each store, `f16[layers, 1, kv_heads, head_dim]`; None without them."""
    means: list[jax.Array | None] = [None] * len(config.stores)
    for group in config.groups:
        if group.spec.kv_codec.key_mean == "static":
            means[group.stores[-1]] = _stored_means(group, key_means, len(config.layers))
    return means


def _stored_means(
    group: LayerGroup, key_means: Sequence[jax.Array] | None, layers: int
) -> jax.Array:
    """A group's means as stored: rotated, float16."""
    shape, codec = (group.spec.kv_heads, group.spec.head_dim), group.spec.kv_codec
    if key_means is None:
        raise ValueError(
            f"codec {codec.name!r} removes a static key mean, and key_means=None: fit them with "
            "jaxkv.fit_key_means (scripts/fit_key_means.py), or use key_mean='page' or None."
        )
    listed = isinstance(key_means, Sequence) or np.ndim(key_means) > 0
    if not listed or len(key_means) != layers:
        raise ValueError(
            f"key_means must have one mean for each of {layers} layers, not {shown(key_means)}."
        )
    own = [jnp.asarray(key_means[layer]) for layer in group.layers]
    for layer, mean in zip(group.layers, own, strict=True):
        if mean.shape != shape:
            raise ValueError(f"key_means[{layer}].shape={mean.shape} must be {shape}.")
    return codec.stored_mean(jnp.stack(own))[:, None]
