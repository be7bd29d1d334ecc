"""The Triton kernels run interpreted, and with a GPU compiled too (pytest -m gpu)."""

import dataclasses

import jax
import pytest

from pallas_kernels.paged_attention.triton import backend, call, chunks, tiles, work_list
from tests.pallas_kernels.paged_attention import paged_cases


@pytest.fixture(params=["interpret", pytest.param("compiled", marks=pytest.mark.gpu)])
def interpret(request):
    return request.param == "interpret"


@pytest.fixture(autouse=True)
def on_the_host():
    """Cases and oracles: a GPU would compile every small step of theirs."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture
def few_programs(monkeypatch):
    """Tile sizes as they are chosen, but programs so few that their shares cross sequences.

    Gives a list of the shapes that were planned.
    """
    planned = []

    def plan_work(bounds, *args):
        planned.append(bounds.q_start.shape)
        return work_list.plan_work(bounds, *args)

    def few(choose):
        sizes = dict(programs=6, least_tokens=16, good_tokens=16, unsplit=False)
        return lambda *args: dataclasses.replace(choose(*args), **sizes)

    monkeypatch.setattr(call, "plan_work", plan_work)
    monkeypatch.setattr(call, "choose_config", few(tiles.choose_config))
    monkeypatch.setattr(chunks, "chunk_config", few(tiles.chunk_config))
    traced = (backend._attend_few, backend._attend_chunk, paged_cases.attend_op)
    for function in traced:
        function.clear_cache()
    yield planned
    for function in traced:
        function.clear_cache()
