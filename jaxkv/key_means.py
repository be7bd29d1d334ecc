"""Per-channel means of a model's keys, for codecs that remove a static one before they rotate."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache import KVCache
from jaxkv.config import CacheConfig
from jaxkv.keep import Keep
from jaxkv.model import Model
from jaxkv.page_tables import look_up
from pallas_kernels.checks import shown, whole_number


def fit_key_means(model: Model, tokens: Sequence[int], *, chunk: int = 256) -> list[np.ndarray]:
    """Means of each layer's keys, after RoPE, over a text.

    Runs the text through an exact cache and averages its keys. The first token is left out: its key
    is far from all others (an attention sink), and every recipe keeps it exact.

    Args:
      model: `models.load(...)`, or anything that `Model` describes.
      tokens: token ids of a text, a few hundred at least; not one that will be scored.
      chunk: tokens per step.

    Returns:
      `f32[kv_heads, head_dim]` for each layer: `key_means` of `KVCache.create` and `generate`.

    Raises:
      ValueError: fewer than two tokens, or something else than token ids.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids < 0).any():
        raise ValueError(f"tokens must be a flat sequence of token ids, not {shown(tokens)}.")
    if len(tokens) < 2:
        raise ValueError(f"tokens has {len(tokens)}: at least 2 are needed.")
    whole_number("chunk", chunk, least=1)
    specs = model.layer_specs(Keep())
    config = CacheConfig(layers=tuple(specs), batch=1, max_tokens=len(tokens), max_new_tokens=chunk)
    cache = KVCache.create(config)
    sums = [jnp.zeros((spec.kv_heads, spec.head_dim)) for spec in specs]
    for start in range(0, len(tokens), chunk):
        new = jnp.asarray(tokens[start : start + chunk], jnp.int32)[None]
        padded = jnp.pad(new, ((0, 0), (0, chunk - new.shape[1])))
        cache, sums = _add_chunk(model, padded, jnp.int32([new.shape[1]]), cache, sums)
    return [np.asarray(total) / (len(tokens) - 1) for total in sums]


@jax.jit
def _add_chunk(model: Model, tokens, count, cache: KVCache, sums):
    """Runs a chunk and adds its keys to each layer's sum, except the text's first."""
    position = cache.positions(tokens.shape[1])
    _, cache = model(tokens, cache.prepare(count), backend=None)
    counts = (position > 0) & (position < cache.lengths[:, None] + cache.pending[:, None])
    new = []
    for layer, total in enumerate(sums):
        number, index = cache.config.locate(layer)
        store = cache.stores[cache.config.groups[number].stores[0]]
        size = cache.config.page_size
        page = look_up(store.tables, position // size)
        # [1, tokens, kv_heads, head_dim]
        keys = store.pages.arrays["k"][index, page, :, position % size]
        keys = jnp.where(counts[..., None, None], keys.astype(jnp.float32), 0)
        new.append(total + keys.sum(axis=(0, 1)))
    return cache.commit(cache.pending), new
