"""scripts/bench/peers/kernels.py: peers get the same keys as our kernels."""

import jax
import jax.numpy as jnp
import pytest

from scripts.bench.attend import expected, relative_error
from scripts.bench.cases import WORKLOADS, Case, Workload
from scripts.bench.fill import make_data
from scripts.bench.peers.kernels import contiguous_keys
from scripts.bench.problems import make_problem


@pytest.mark.parametrize("window", [None, 50])
def test_keys_without_pages_attend_as_the_pages_do(window, monkeypatch):
    shape = Workload(q_heads=4, kv_heads=2, head_dim=64, window=window)
    monkeypatch.setitem(WORKLOADS, "tiny", shape)
    problem = make_problem(Case(workload="tiny", batch=2, context=200, codec="exact"), page_size=16)
    data = make_data(problem.sizes, jax.random.key(0))
    spans = problem.spans(problem.lengths)
    want = expected(problem.sizes, data, jnp.asarray(problem.table), spans, 1)
    k, v = contiguous_keys(problem, data, 1)
    assert k.shape == (2, 2, window or 200, 64)
    q = data.q.reshape(2, 2, 2, 64).astype(jnp.float32) / 8
    p = jax.nn.softmax(jnp.einsum("bhgd,bhkd->bhgk", q, k.astype(jnp.float32)))
    out = jnp.einsum("bhgk,bhkd->bhgd", p, v.astype(jnp.float32)).reshape(want.shape)
    assert relative_error(out, want) < 1e-5
    assert relative_error(out * jnp.nan, want) == float("inf")
