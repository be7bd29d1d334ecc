"""Other attention kernels beside ours, in the same process: JAX's paged attention, torch's SDPA.

A peer that can't serve a case says why.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from models.errors import one_line
from scripts.bench.attend import abstract_inputs, relative_error
from scripts.bench.fill import Data, exact_pools
from scripts.bench.problems import EXACT_DTYPE, Problem, Sizes
from scripts.bench.timing import Timing, device_time
from scripts.shared.options import GIB

JAX_PEER = "jax paged_attention"
TORCH_PEER = "torch SDPA"
JAX_TILINGS = ((1, 4, 2), (2, 4, 2), (2, 8, 3))  # pages per step, warps, stages
PROGRAMS = 1056  # sequences are split so that there are about this many


@functools.cache
def jax_peer_module():
    """JAX's example kernel; None where this version of JAX lacks it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
        except ImportError:
            return None


def dense_peer_refusal(problem: Problem) -> str | None:
    """Why no peer serves a case; None if one may."""
    if problem.case.codec != "exact":
        return "bfloat16 alone"
    if jax.default_backend() != "gpu":
        return "needs a GPU"
    return "no learned sinks" if problem.sizes.workload.learned_sinks else None


def jax_peer_refusal(problem: Problem) -> str | None:
    """Why JAX's paged attention does not serve a case; None if it does."""
    if reason := dense_peer_refusal(problem):
        return reason
    if problem.sizes.workload.window is not None:
        return "no window"
    return None if jax_peer_module() else "this JAX has none"


def jax_peer_splits(sizes: Sizes) -> int:
    """Parts that each sequence is cut into."""
    programs = sizes.batch * sizes.workload.kv_heads
    return pl.next_power_of_2(max(1, -(-PROGRAMS // programs)))


def jax_peer(module, sizes: Sizes, tiling, q, k_pages, v_pages, table, lengths) -> jax.Array:
    """JAX's output; pools are `[kv_heads, pages, page_size, head_dim]`, the table gets padded."""
    block_pages, warps, stages = tiling
    splits = jax_peer_splits(sizes)
    extra = -table.shape[1] % (splits * block_pages)
    scaled = q[:, 0].astype(jnp.float32) * sizes.workload.head_dim**-0.5  # it does not scale
    out = module.paged_attention(
        scaled.astype(q.dtype),
        k_pages,
        v_pages,
        jnp.pad(table, ((0, 0), (0, extra))),
        lengths,
        pages_per_compute_block=block_pages,
        k_splits=splits,
        num_warps=warps,
        num_stages=stages,
    )
    return out[:, None].astype(jnp.float32)


def jax_peer_inputs(sizes: Sizes) -> tuple:
    """The shapes of queries, pools, page table and lengths, to compile for."""
    data, table, spans = abstract_inputs(sizes)
    shape = sizes.workload
    pool = jax.ShapeDtypeStruct(
        (shape.kv_heads, sizes.pages, sizes.page_size, shape.head_dim), EXACT_DTYPE
    )
    return data.q, pool, pool, table, spans["kv_stop"]


class PeerResult(NamedTuple):
    """A peer's time and error, and notes on how it was run."""

    timing: Timing
    error: float | None
    notes: dict[str, str]


class Checked(NamedTuple):
    """The reference's outputs on the last layer."""

    timed: jax.Array  # at the lengths that are timed
    random: jax.Array  # at random lengths


def run_jax_peer(
    problem: Problem, data: Data, programs, want: Checked | None, repeats: int
) -> PeerResult:
    """Measures it at its best tiling."""
    sizes, (k, v) = problem.sizes, exact_pools(data)
    heads_first = jax.jit(lambda pool, layer: jnp.swapaxes(pool[layer], 0, 1))
    pools = [(heads_first(k, layer), heads_first(v, layer)) for layer in range(sizes.layers)]
    table = jnp.asarray(problem.table)
    best, timing, error, refused = "", None, None, ""
    for tiling in JAX_TILINGS:
        try:
            program = programs[f"jax {tiling}", sizes].result()
        except Exception as failure:  # a tiling may not compile: others do
            refused = one_line(failure)
            continue
        lengths = problem.spans(problem.random_lengths())["kv_stop"]
        found = program(data.q, *pools[-1], table, lengths)
        lengths = problem.spans(problem.lengths)["kv_stop"]
        calls = [
            functools.partial(program, data.q, *pools[i % sizes.layers], table, lengths)
            for i in range(repeats)
        ]
        jax.block_until_ready([call() for call in calls[:2]])
        now = device_time(calls)
        if now is not None and (timing is None or now.us < timing.us):
            best, timing = f"pages, warps, stages {tiling}", now
            error = None if want is None else relative_error(found, want.random)
    if timing is None:
        raise NotImplementedError(refused or "no device time")
    return PeerResult(timing, error, {"tiling": best})


def torch_peer_refusal(problem: Problem) -> str | None:
    """Why torch's SDPA does not serve a case; None if it may."""
    if reason := dense_peer_refusal(problem):
        return reason
    return "no ragged lengths" if problem.case.ragged else None


def contiguous_keys(problem: Problem, data: Data, layer: int) -> tuple:
    """Visible keys and values copied out of their pages, `[batch, kv_heads, tokens, head_dim]`."""
    size, width = problem.sizes.page_size, problem.sizes.width
    length, window = int(problem.lengths[0]), problem.sizes.workload.window
    start = 0 if window is None else max(0, length - window)
    first, stop = start // size, -(-length // size)
    order = problem.table[:, np.arange(first, stop) % width]

    @jax.jit
    def gather(pool, layer, order):
        x = jnp.swapaxes(pool[layer, order], 1, 2)  # [batch, kv_heads, pages, page_size, head_dim]
        x = x.reshape(*x.shape[:2], -1, x.shape[-1])
        return x[:, :, start - first * size : length - first * size]

    return tuple(gather(pool, layer, jnp.asarray(order)) for pool in exact_pools(data))


def run_torch_peer(problem: Problem, data: Data, want: Checked | None, repeats: int) -> PeerResult:
    """Measures SDPA over contiguous keys, an upper bound for dense kernels: it reads no pages."""
    try:
        import torch  # type: ignore[import-not-found]
    except ImportError:
        raise NotImplementedError("torch is not installed") from None
    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    sizes = problem.sizes
    shared = [contiguous_keys(problem, data, layer) for layer in range(sizes.layers)]
    q = jnp.swapaxes(data.q, 1, 2)
    jax.block_until_ready((q, shared))
    keys = [tuple(torch.from_dlpack(x) for x in pair) for pair in shared]
    query = torch.from_dlpack(q)
    run = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    times = []
    with torch.inference_mode():
        found = run(query, *keys[-1]).float().transpose(1, 2).cpu().numpy()
        for i in range(repeats + 3):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(query, *keys[i % sizes.layers])
            stop.record()
            times.append((start, stop))
        torch.cuda.synchronize()
    us = np.asarray([1e3 * start.elapsed_time(stop) for start, stop in times[3:]])
    timing = Timing(float(np.median(us)), float(us.min()), float(us.max()))
    error = None if want is None else relative_error(jnp.asarray(found), want.timed)
    return PeerResult(timing, error, {})


def measure_peers(
    problem: Problem,
    data: Data,
    programs,
    want: Checked | None,
    *,
    repeats: int,
    max_gib: float,
) -> Iterator[tuple[str, PeerResult | str]]:
    """Measures each peer that serves the case.

    Returns:
      Pairs of a peer's name and its result, or the reason why there is none.
    """
    peers: dict[str, tuple[Callable, Callable]] = {
        JAX_PEER: (
            jax_peer_refusal,
            lambda: run_jax_peer(problem, data, programs, want, repeats),
        ),
        TORCH_PEER: (torch_peer_refusal, lambda: run_torch_peer(problem, data, want, repeats)),
    }
    pool_bytes = problem.sizes.layers * problem.sizes.layer_bytes
    for name, (refusal, run) in peers.items():
        reason = "its case with smaller pools has it" if problem.case.layers else refusal(problem)
        if 2 * pool_bytes > max_gib * GIB:
            reason = reason or f"a second copy of the pools exceeds --max-gib {max_gib:g}"
        if reason is not None:
            yield name, reason
            continue
        try:
            result = run()
        except Exception as failure:  # a peer's fault is none of ours
            result = one_line(failure)
        yield name, result
