"""Softmax in base 2: GPUs have an instruction for `2^x`, so scores are scaled by log2(e)."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.triton.ptx import inline

LOG2E, LN2 = math.log2(math.e), math.log(2)


def exp2(x: jax.Array, asm: bool) -> jax.Array:
    """`2^x`, float32; with `asm` by PTX, without the two steps that extend its range."""
    if not asm:
        return jnp.exp2(x)
    return inline("ex2.approx.ftz.f32 $0, $1;", [x], "=f,f", 1, jnp.float32)
