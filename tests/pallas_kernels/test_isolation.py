"""Through a whole cache, a token that is not finite changes no row that does not see it.

Every token of a text is spoiled once, in a sequence of its own, in a batch that is otherwise alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import CacheConfig, KVCache, LayerSpec
from jaxkv.codecs import get_codec

PAGE, TOKENS, CHUNK, HEAD_DIM = 8, 56, 28, 16
# With tq4 and tq3 a text of seven pages has exact sinks, exact newest pages, and codes between.
CASES = [
    dict(codec="int8", window=21, sink_tokens=3),
    dict(codec="tq4"),
    dict(codec="tq3", window=21),
    pytest.param(dict(codec="exact", window=21, sink_tokens=3), marks=pytest.mark.slow),
    pytest.param(dict(codec="k8v4"), marks=pytest.mark.slow),
    pytest.param(dict(codec="3bit_nc", window=21), marks=pytest.mark.slow),
    pytest.param(dict(codec="tq4", window=30, sink_tokens=3), marks=pytest.mark.slow),
]
# With a mean, or there would be nothing to remove.
DRAWN = np.random.default_rng(0).standard_normal((3, 1, TOKENS, 1, HEAD_DIM), np.float32) + 0.5
Q, K, V = np.repeat(DRAWN, TOKENS, axis=1)


@jax.jit
def attend_chunk(cache, q, k, v):
    count = jnp.full(TOKENS, CHUNK, jnp.int32)
    cache, out = cache.prepare(count).attend(0, q, k, v, scale=0.3)
    return cache.commit(count), out


def attend_text(k, v, **fields):
    """Outputs of all tokens, which come in chunks: `[batch, tokens, heads, head_dim]`."""
    spec = LayerSpec(kv_heads=1, head_dim=HEAD_DIM, **fields)
    sizes = dict(batch=TOKENS, max_tokens=TOKENS, max_new_tokens=CHUNK, page_size=PAGE)
    cache = KVCache.create(CacheConfig(layers=(spec,), platform="cpu", **sizes))
    outs = []
    for start in range(0, TOKENS, CHUNK):
        own = slice(start, start + CHUNK)
        cache, out = attend_chunk(cache, Q[:, own], k[:, own], v[:, own])
        outs.append(np.asarray(out))
    return np.concatenate(outs, axis=1)


def poison(x, bad):
    """Puts `bad` at token `b` of sequence `b`."""
    x = x.copy()
    x[np.arange(TOKENS), np.arange(TOKENS)] = bad
    return x


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_a_token_that_is_not_finite(fields):
    clean, exact = attend_text(K, V, **fields), attend_text(K, V, **fields | dict(codec="exact"))
    j, i = np.arange(TOKENS)[:, None], np.arange(TOKENS)[None]
    window, sinks = fields.get("window", TOKENS), fields.get("sink_tokens", 0)
    seen = (j <= i) & ((i - j < window) | (j < sinks))
    shares = shares_a_mean(get_codec(fields["codec"]), i, j, window) & ~seen
    assert shares.any() == (fields["codec"] == "tq3" or fields == CASES[-1].values[0])
    for bad in (np.nan, np.inf, -np.inf):
        out = attend_text(K, poison(V, bad), **fields)
        np.testing.assert_array_equal(out[~seen], clean[~seen])
        out = attend_text(poison(K, bad), V, **fields)
        rows = ~seen & ~shares
        np.testing.assert_array_equal(out[rows], clean[rows])
        # Elsewhere the codes have another mean, and about the same error.
        error = lambda x: np.linalg.norm((x - exact)[shares])
        assert error(out) <= 1.5 * error(clean)


def shares_a_mean(codec, i, j, window):
    """Whether query `i` reads codes of key `j`'s page: its last tokens, which are in the window."""
    if codec.key_mean != "page":
        return np.zeros((TOKENS, TOKENS), bool)
    last = j // PAGE * PAGE + PAGE - 1
    return (i - last < window) & (i // PAGE - j // PAGE >= codec.recent_pages)
