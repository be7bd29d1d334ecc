"""The GPU kernel stores the same bits as plain XLA and nothing else, and it copies no pool.

On a CPU the kernel is interpreted; with a GPU the same cases run compiled (pytest -m gpu).
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.codecs import get_codec
from pallas_kernels.backends import interpret_kernels
from pallas_kernels.pages import Pages
from pallas_kernels.write_pages import choose, triton, write_pages

pytestmark = pytest.mark.both_pythons

LAYERS, PAGE_SIZE, BATCH = 2, 16, 3


@pytest.fixture(params=["interpret", pytest.param("compiled", marks=pytest.mark.gpu)])
def kernels(request):
    with interpret_kernels() if request.param == "interpret" else contextlib.nullcontext():
        yield request.param
    if jax.default_backend() == "gpu":  # without a GPU no test runs compiled kernels afterwards
        jax.clear_caches()  # functions that were traced interpreted must not be called outside


def make_case(tokens, kv_heads, head_dim, dtype="bfloat16", new_dtype="float32", seed=0):
    """Pools of NaN, new keys and values, and a random place for each token that is written."""
    rng = np.random.default_rng(seed)
    pages = 2 + -(-BATCH * tokens // PAGE_SIZE)
    shape = (LAYERS, pages, kv_heads, PAGE_SIZE, head_dim)
    pools = Pages.exact(k=jnp.full(shape, jnp.nan, dtype), v=jnp.full(shape, jnp.nan, dtype))
    draw = lambda: jnp.asarray(rng.standard_normal((BATCH, tokens, *shape[2::2])), new_dtype)
    place = rng.permutation(pages * PAGE_SIZE)[: BATCH * tokens].reshape(BATCH, tokens)
    writes = rng.random((BATCH, tokens)) < 0.7
    writes.flat[:2] = True, False
    place = np.where(writes, place, place[0, 0])  # tokens not to be written name a written place
    where = dict(
        page=jnp.asarray(place // PAGE_SIZE, jnp.int32),
        slot=jnp.asarray(place % PAGE_SIZE, jnp.int32),
        writes=jnp.asarray(writes),
    )
    return pools, draw(), draw(), where


def assert_same_bits(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        bits = f"u{x.dtype.itemsize}"
        np.testing.assert_array_equal(np.asarray(x).view(bits), np.asarray(y).view(bits))


CASES = {
    "decode": dict(tokens=1, kv_heads=8, head_dim=128),
    "one head": dict(tokens=1, kv_heads=1, head_dim=256, new_dtype="bfloat16"),
    "verify": dict(tokens=3, kv_heads=3, head_dim=80, dtype="float16"),
    "chunk": dict(tokens=40, kv_heads=3, head_dim=64, new_dtype="float16"),
    "wide": dict(tokens=3, kv_heads=8, head_dim=256, dtype="float32", new_dtype="bfloat16"),
    "narrow": dict(tokens=40, kv_heads=1, head_dim=24, dtype="float32"),
}


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pages_are_those_of_xla(case, many, kernels, monkeypatch):
    if many:
        monkeypatch.setattr(triton, "FEW_TOKENS", 0)
    pools, k, v, where = make_case(**case)
    want = write_pages(pools, k, v, layer=1, **where, backend="xla")
    got = write_pages(pools, k, v, layer=1, **where, backend="gpu")
    assert np.isfinite(want.arrays["k"]).sum() == where["writes"].sum() * k[0, 0].size
    assert_same_bits(got, want)


def test_keys_and_values_of_unlike_types(kernels):
    pools, k, v, where = make_case(3, 2, 64)
    want, got = (
        write_pages(pools, k, v.astype(jnp.float16), layer=1, **where, backend=backend)
        for backend in ("xla", "gpu")
    )
    assert_same_bits(got, want)


def step(pools, k, v, where, backend):
    """Writes every layer in a scan."""

    def body(pools, layer):
        return write_pages(pools, k, v, layer=layer, **where, backend=backend), None

    return jax.lax.scan(body, pools, jnp.arange(LAYERS, dtype=jnp.int32))[0]


def test_layers_in_a_scan_write_into_donated_pools(kernels):
    run = jax.jit(step, static_argnames="backend", donate_argnames="pools")
    want, got = (run(*make_case(3, 2, 64), backend=backend) for backend in ("xla", "gpu"))
    assert_same_bits(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("scan", [True, False])
def test_no_pool_is_copied(scan, tokens):
    def unrolled(pools, k, v, where, backend):
        for layer in range(LAYERS):
            pools = write_pages(pools, k, v, layer=layer, **where, backend=backend)
        return pools

    pools, k, v, where = make_case(tokens, 2, 64)
    run = functools.partial(step if scan else unrolled, backend="gpu")
    compiled = jax.jit(run, donate_argnums=0).lower(pools, k, v, where).compile()
    pool = pools.arrays["k"]
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * pool.nbytes
    shape = re.escape(f"[{','.join(map(str, pool.shape))}]")
    assert not re.findall(rf"= \w+{shape}\S* copy\S*\(.*", compiled.as_text())


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="later JAX wants a GPU to lower for it")
@pytest.mark.parametrize("tokens", [1, 512])
def test_lowers_for_cuda_with_its_pools_aliased(tokens):
    pools, k, v, where = make_case(tokens, 3, 80)
    write = jax.jit(lambda pools, k, v, where: triton.write_pages(pools, k, v, layer=1, **where))
    text = write.trace(pools, k, v, where).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("output_operand_alias<") == 2


def test_what_the_kernel_does_not_serve_is_named():
    pools, k, v, where = make_case(1, 2, 64)
    assert choose(None, pools, platform="gpu") == "gpu"
    assert choose(None, pools, platform="cpu") == "xla"
    assert choose("xla", pools, platform="gpu") == "xla"
    with pytest.raises(NotImplementedError, match="^write_pages: backend='gpu' needs an NVIDIA"):
        choose("gpu", pools, platform="cpu")
    with pytest.raises(NotImplementedError, match="has no 'reference' backend"):
        write_pages(pools, k, v, layer=0, **where, backend="reference")
    k_pool, v_pool = pools.arrays["k"], pools.arrays["v"]
    unlike = Pages.exact(k_pool, v_pool.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match="bfloat16 keys, float16 values"):
        choose("gpu", unlike, platform="gpu")
    odd = jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn), pools)
    with pytest.raises(NotImplementedError, match="^write_pages: float8_e4m3fn pages: the GPU"):
        choose("gpu", odd, platform="gpu")


def test_explain_names_who_writes():
    def writers(codec):
        spec = jaxkv.LayerSpec(kv_heads=2, head_dim=64, codec=codec)
        config = jaxkv.CacheConfig(layers=(spec,), batch=1, max_tokens=99)
        return {p: jaxkv.explain(config, platform=p)[0].write for p in ("cpu", "gpu")}

    assert writers("exact") == {"cpu": "xla", "gpu": "gpu"}
    assert get_codec("tq4").recent_pages > 0  # tokens come into exact pages first
    assert writers("tq4") == {"cpu": "xla", "gpu": "gpu"}
    assert get_codec("4bit_nc").recent_pages == 0
    assert writers("4bit_nc") == {"cpu": "xla", "gpu": "xla"}
