"""What the benchmark of decode attention runs, compiled ahead for shapes alone, in threads."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from rich.console import Console

from pallas_kernels.backends import Backend
from scripts.bench.attend import abstract_inputs, attend, expected
from scripts.bench.fill import Data, make_data
from scripts.bench.peers.kernels import JAX_TILINGS, jax_peer, jax_peer_inputs, jax_peer_module
from scripts.bench.problems import Sizes
from scripts.shared.progress import working

COMPILE_THREADS = 12
NOT_VISIBLE = 1e-30  # times an output, added to a query: depends on it, changes nothing

Attend = Callable[..., jax.Array]
Job = tuple[str, Sizes]  # a program's name, and the shapes that it is compiled for
Jobs = dict[Job, Callable]
Programs = dict[Job, Future]


def attend_nothing(data: Data, table, spans, layer) -> jax.Array:
    """An empty kernel in place of the op: its time is that of the loop itself."""
    del table, spans, layer
    [out] = pl.pallas_call(
        lambda q_ref, out_ref: None,
        out_shape=[jax.ShapeDtypeStruct(data.q.shape, jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=jax.default_backend() != "gpu",
        name="empty",
    )(data.q)
    return out


def loop(call: Attend, sizes: Sizes, data: Data, table, spans) -> jax.Array:
    """`sizes.steps` calls, layers in turn, each of which needs the one before."""

    def body(i, q):
        # Without the barrier XLA computes the parts that depend on lengths alone once for all.
        spans_now, q = jax.lax.optimization_barrier((spans, q))
        out = call(data._replace(q=q), table, spans_now, jax.lax.rem(i, sizes.layers))
        return q + (NOT_VISIBLE * out).astype(q.dtype)

    return jax.lax.fori_loop(0, sizes.steps, body, data.q)


def attention_jobs(sizes: Sizes, backend: Backend, *, check: bool, jax_peer_too: bool) -> Jobs:
    """What to compile for cases of these sizes.

    Args:
      sizes: cases with equal ones share these programs.
      backend: of the attention.
      check: also compile the reference.
      jax_peer_too: also compile JAX's own paged attention, once for each of its tilings.
    """
    jobs: Jobs = {}

    def add(name, function, *inputs):
        jobs[name, sizes] = lambda: jax.jit(function).lower(*inputs).compile()

    inputs, layer = abstract_inputs(sizes), jax.ShapeDtypeStruct((), jnp.int32)
    call = jax.jit(functools.partial(attend, sizes, backend))  # traced once for both
    add("attend", call, *inputs, layer)
    add("loop", functools.partial(loop, call, sizes), *inputs)
    add("empty", functools.partial(loop, attend_nothing, sizes), *inputs)
    add("data", functools.partial(make_data, sizes), jax.eval_shape(lambda: jax.random.key(0)))
    if check:
        add("expected", functools.partial(expected, sizes), *inputs, layer)
    if jax_peer_too:
        for tiling in JAX_TILINGS:
            function = functools.partial(jax_peer, jax_peer_module(), sizes, tiling)
            add(f"jax {tiling}", function, *jax_peer_inputs(sizes))
    return jobs


def compile_all(jobs: Mapping[Any, Callable], log: Console) -> dict[Any, Future]:
    """Compiles in threads, which takes most of a run's time; a future keeps its error."""
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        programs = {name: pool.submit(job) for name, job in jobs.items()}
        with working(log, f"compiling {len(programs)} programs"):
            wait(programs.values())
    return programs
