"""The GPU kernel names the cases that it does not serve."""

import pytest

from jaxkv import CacheConfig, KVCache, LayerSpec
from pallas_kernels.paged_attention.triton import call
from tests.pallas_kernels.paged_attention.triton.kernel_cases import make_case


def test_shapes_that_are_not_served():
    with pytest.raises(NotImplementedError, match="^head_dim=32: the GPU kernel serves"):
        make_case(head_dim=32).attend_kernel(interpret=True)
    with pytest.raises(NotImplementedError, match="^group=129: the GPU kernel serves up to 128"):
        make_case(group=129, lengths=(1,), kv_heads=1).attend_kernel(interpret=True)
    long = make_case(group=33, q_lens=(4, 1, 1, 1), lengths=(4, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="^group=33, q_tokens=4: their product"):
        long.attend_kernel(interpret=True)


def test_chunks_of_float32_pages_are_not_served():
    long = make_case("float32", lengths=(9,), q_lens=(9,))
    with pytest.raises(NotImplementedError, match="float32 pages, q_tokens=9: the GPU kernel"):
        long.attend(backend="gpu", interpret=True)


def test_layouts_that_are_not_served():
    with pytest.raises(NotImplementedError, match="^word_bits=8: the GPU kernel reads words"):
        make_case("tq4", word_bits=8).attend_kernel(interpret=True)
    spec = LayerSpec(kv_heads=2, head_dim=64, codec="fp8_e4m3")
    for_cpus = CacheConfig(layers=(spec,), batch=1, max_tokens=64, page_size=16, platform="cpu")
    [store] = KVCache.create(for_cpus).stores
    reason = call.refusal(store.pages, q_tokens=1, group=2)
    assert reason == "TokensLast: the GPU kernel reads TokenMajor pages"
