"""How fast a device's memory is read and copied: no attention can be faster than that."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scripts.bench.timing import time_calls, wall_times


class Ceilings(NamedTuple):
    """Speeds in TB/s."""

    read: float  # of bytes read
    copy: float  # of bytes read and written
    read_by: str  # the program that read fastest


READ_TILINGS = ((1024, 2, 1024), (1024, 4, 256), (2048, 4, 512), (2048, 8, 256), (4096, 8, 64))


def read_kernel(x_ref, out_ref, *, block: int, steps: int):
    """Combines `steps` blocks by xor."""
    i = pl.program_id(0)
    body = lambda k, acc: acc ^ x_ref[pl.ds((i * steps + k) * block, block)]
    zeros = jnp.zeros((block,), jnp.uint32)
    out_ref[pl.ds(i * block, block)] = jax.lax.fori_loop(0, steps, body, zeros)


def read_program(size: int, block: int, warps: int, steps: int) -> Callable:
    """Reads `size` words, `block` at once, `steps` times in each program."""
    programs = size // (block * steps)
    return pl.pallas_call(
        functools.partial(read_kernel, block=block, steps=steps),
        out_shape=jax.ShapeDtypeStruct((programs * block,), jnp.uint32),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        name="read",
    )


def measure_ceilings() -> Ceilings:
    """The best of several reductions over 4 GB, and a copy of them."""
    gpu = jax.default_backend() == "gpu"
    size = 2**30 - 2**20 if gpu else 2**24  # 32-bit offsets reach it
    x = jax.jit(lambda: jax.random.bits(jax.random.key(0), (size,), jnp.uint32))()
    readers = {"xla sum": jnp.sum}
    if gpu:
        for tiling in READ_TILINGS:
            readers[f"pallas {tiling}"] = read_program(size, *tiling)

    def speed(function) -> float:
        program = jax.jit(function)
        program(x).block_until_ready()
        return 4 * size / time_calls([functools.partial(program, x)] * 6).us / 1e6

    speeds = {name: speed(function) for name, function in readers.items()}
    best = max(speeds, key=lambda name: speeds[name])
    return Ceilings(speeds[best], 2 * speed(lambda x: x ^ np.uint32(1)), best)


def least_read_seconds(arrays) -> float:
    """Least time to read the pytree's arrays once: their bytes over the measured read speed."""
    x = jnp.ones((64 << 20,), jnp.float32)  # 256 MiB, past every cache
    total = jax.jit(jnp.sum)
    seconds = wall_times(lambda: total(x), 5).min() / 1e6
    return sum(array.nbytes for array in jax.tree.leaves(arrays)) / (x.nbytes / seconds)
