"""Ops compute in 32 bits under `jax_enable_x64`, too, and give the same bits as without it.

Under that flag sums of int32, indices from searches and plain Python numbers have 64 bits, which
kernels don't take and pools don't hold.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

NARROW = {"float64": "float32", "int64": "int32", "uint64": "uint32"}


def in_32_bits(op: Callable) -> Callable:
    """Traces `op` as if the flag were off; its arrays of 64-bit numbers are narrowed before."""

    @functools.wraps(op)
    def narrowed(*args, **kwargs):
        if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            return op(*args, **kwargs)
        args, kwargs = jax.tree.map(_narrow, (args, kwargs))
        with jax.enable_x64(False):
            return op(*args, **kwargs)

    return narrowed


def _narrow(x):
    if isinstance(x, jax.Array | np.ndarray) and x.dtype.name in NARROW:
        return x.astype(NARROW[x.dtype.name])
    return x
