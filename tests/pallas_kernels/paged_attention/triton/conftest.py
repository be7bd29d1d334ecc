"""Fixtures: the Triton kernels run interpreted and, with a GPU, also compiled (pytest -m gpu)."""

import dataclasses

import jax
import pytest

from pallas_kernels.paged_attention.triton import backend, call, chunks, tile_sizes, work_list
from tests.pallas_kernels.paged_attention import paged_cases


@pytest.fixture(params=["interpret", pytest.param("compiled", marks=pytest.mark.gpu)])
def interpret(request):
    return request.param == "interpret"


@pytest.fixture(autouse=True)
def on_the_host():
    """Builds cases and runs oracles on the CPU: on a GPU each of their small steps is compiled."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture
def few_programs(monkeypatch):
    """Launches only 6 programs, so that their shares cross sequences; tile sizes stay as chosen.

    Yields a list to which every planned work list adds the shape of its batch.
    """
    planned = []

    def plan_work(bounds, *args):
        planned.append(bounds.q_start.shape)
        return work_list.plan_work(bounds, *args)

    def few(choose):
        sizes = dict(programs=6, least_tokens=16, good_tokens=16, unsplit=False)
        return lambda *args: dataclasses.replace(choose(*args), **sizes)

    monkeypatch.setattr(call, "plan_work", plan_work)
    monkeypatch.setattr(call, "choose_config", few(tile_sizes.choose_config))
    monkeypatch.setattr(chunks, "chunk_config", few(tile_sizes.chunk_config))
    traced = (backend._attend_few, backend._attend_chunk, paged_cases.attend_op)
    for function in traced:
        function.clear_cache()
    yield planned
    for function in traced:
        function.clear_cache()
