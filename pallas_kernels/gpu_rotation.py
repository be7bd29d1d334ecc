"""Rotation of vectors by a codec's matrix of signs, on the matrix units of NVIDIA GPUs.

Where `head_dim` is a power of two the matrix is +-1 beside one factor, and +-1 is exact in
bfloat16: a float32 vector in three parts of 8 bits loses nothing. XLA's float32 product and what it
leaves outside of it (scale, range, cast) take four times as long.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

SMS = 132  # of an H100
COLUMNS = 64  # of a program


def rotate_rows(
    x: jax.Array,
    transform: Callable[[jax.Array], jax.Array],
    *,
    scale: float = 1.0,
    limit: float | None = None,
    out_dtype=jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """`transform(x) * scale`, clipped to `+-limit`, as `out_dtype`.

    Args:
      x: `[..., head_dim]`, any float dtype.
      transform: a codec's `rotate` or `unrotate`.
      scale: of the result.
      limit: largest magnitude; None for any.
      out_dtype: of the result.
      interpret: run on the CPU.
    """
    head_dim = x.shape[-1]
    if not is_sign_matrix(head_dim):
        y = transform(x) * scale
        return (y if limit is None else jnp.clip(y, -limit, limit)).astype(out_dtype)
    n = x.size // head_dim
    rows = 16 if n <= 16 * 4 * SMS else 64
    columns = min(COLUMNS, head_dim)
    out = pl.pallas_call(
        functools.partial(
            _kernel, rows=rows, columns=columns, scale=scale * head_dim**-0.5, limit=limit
        ),
        out_shape=jax.ShapeDtypeStruct((n, head_dim), out_dtype),
        grid=(pl.cdiv(n, rows), head_dim // columns),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rotate_rows",
    )(x.reshape(n, head_dim), sign_matrix(transform, head_dim))
    return out.reshape(x.shape)


def is_sign_matrix(head_dim: int) -> bool:
    """Whether a rotation's entries all have one magnitude (and a dot can hold them)."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def sign_matrix(transform: Callable[[jax.Array], jax.Array], head_dim: int) -> jax.Array:
    """A rotation times `sqrt(head_dim)`: +-1, exact in bfloat16, for powers of two."""
    with jax.ensure_compile_time_eval():  # a constant, not work for each step
        return jnp.sign(transform(jnp.eye(head_dim, dtype=jnp.float32))).astype(jnp.bfloat16)


def times_signs(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix` to float32's precision, inside a kernel."""
    if x.dtype == jnp.bfloat16:
        return jnp.dot(x, matrix, preferred_element_type=jnp.float32)
    parts, x = [], x.astype(jnp.float32)
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    dots = [jnp.dot(part, matrix, preferred_element_type=jnp.float32) for part in parts[::-1]]
    return sum(dots[1:], dots[0])


def _kernel(x_ref, matrix_ref, out_ref, *, rows: int, columns: int, scale: float, limit):
    n, head_dim = x_ref.shape
    row = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
    start = pl.program_id(1) * columns
    x = x_ref[jnp.minimum(row, n - 1), pl.ds(0, head_dim)]
    y = times_signs(x, matrix_ref[:, pl.ds(start, columns)]) * scale
    if limit is not None:
        y = jnp.clip(y, -limit, limit)
    column = start + jnp.arange(columns, dtype=jnp.int32)
    real = jnp.broadcast_to((row < n)[:, None], y.shape)
    # Out of bounds where masked: the interpreter would store what stood there.
    place = (jnp.broadcast_to(i, y.shape) for i in (row[:, None], column[None]))
    plgpu.store(out_ref.at[tuple(place)], y.astype(out_ref.dtype), mask=real)
