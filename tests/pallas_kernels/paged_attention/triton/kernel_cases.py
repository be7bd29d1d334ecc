"""Cases that the GPU kernel serves, tile sizes for short sequences, and tolerances."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs.presets import get_codec
from pallas_kernels.paged_attention.triton.tile_sizes import DecodeConfig
from tests.pallas_kernels.paged_attention import paged_cases

FLOATS = ("float32", "float16", "bfloat16")
# Largest relative L2 error. It comes from rounding probabilities and, with coded pages, queries and
# levels.
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 3e-3, "coded": 3e-3}
SMALL = DecodeConfig(block=32, programs=10, good_tokens=32, least_tokens=32)
EDGES = dataclasses.replace(SMALL, mask_all=False)
TRANSPOSED = dataclasses.replace(EDGES, transposed=True)


def make_case(
    store="bfloat16", *, lengths=(1, 33, 64, 150), page_size=16, head_dim=64, **options
) -> paged_cases.Case:
    """Like `paged_cases.make_case` with bfloat16 queries; `store` may also name a codec.

    Table entries of pages outside the segment are beyond the pool: they must never be looked up.
    """
    case = paged_cases.make_case(
        get_codec(store) if isinstance(store, str) and store not in FLOATS else store,
        lengths=lengths,
        page_size=page_size,
        head_dim=head_dim,
        unread=10**6,
        **options,
    )
    queries = dataclasses.replace(case.queries, q=case.queries.q.astype(jnp.bfloat16))
    return dataclasses.replace(case, queries=queries)


def assert_close(got, expected, store="bfloat16"):
    """Asserts that `(out, lse)` is as close to the expected as pages of kind `store` allow."""
    tolerance = TOLERANCE[store if store in FLOATS else "coded"]
    (out, lse), (want, want_lse) = got, expected
    out, lse, want, want_lse = map(np.asarray, (out, lse, want, want_lse))
    seen = np.isfinite(want_lse)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    np.testing.assert_array_equal(out[~seen], 0)
    np.testing.assert_array_equal(lse[~seen], -np.inf)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    assert error <= tolerance, error
    np.testing.assert_allclose(lse[seen], want_lse[seen], atol=3 * tolerance)
