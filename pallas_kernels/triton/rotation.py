"""Rotation of vectors by a codec's matrix of signs, on the matrix units of NVIDIA GPUs.

Where `head_dim` is a power of two, the rotation matrix is a matrix of +-1 times one factor. +-1 is
exact in bfloat16, so a float32 vector, split into three bfloat16 parts of 8 bits, is rotated as
precisely as by a float32 product (for magnitudes from 1e-33 to 1e36). XLA's rotation takes twice as
long, because scaling, clipping and casting are separate steps there.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Up to this many rows a program takes 16 of them: a large GPU is then filled a few times at most.
FEW_ROWS = 8192
COLUMNS = 64  # most output columns per program
PARTS = {"bfloat16": 1, "float16": 2}  # 8-bit parts that make up a value; other dtypes have 3
FLOAT32_MAX = float(np.finfo(np.float32).max)

Transform = Callable[[jax.Array], jax.Array]


def rotate_rows(
    x: jax.Array,
    transform: Transform,
    *,
    scale: float = 1.0,
    limit: float | None = None,
    out_dtype=jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """`transform(x) * scale`, clipped to `+-limit`, as `out_dtype`.

    Args:
      x: `[..., head_dim]`, any float dtype.
      transform: linear, a codec's `rotate` or `unrotate`. It is called in plain JAX if its matrix
        is not one of signs.
      scale: factor of the result.
      limit: largest magnitude of the result; None for no limit.
      out_dtype: dtype of the result.
      interpret: run on the CPU.
    """
    head_dim = x.shape[-1]
    matrix = sign_matrix(transform, head_dim)
    if matrix is None:
        y = transform(x) * scale
        return (y if limit is None else jnp.clip(y, -limit, limit)).astype(out_dtype)
    n = x.size // head_dim
    rows = 16 if n <= FEW_ROWS else 64
    columns = min(COLUMNS, head_dim)
    scale *= head_dim**-0.5
    out = pl.pallas_call(
        functools.partial(_kernel, rows=rows, columns=columns, scale=scale, limit=limit),
        out_shape=jax.ShapeDtypeStruct((n, head_dim), out_dtype),
        grid=(pl.cdiv(n, rows), head_dim // columns),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rotate_rows",
    )(x.reshape(n, head_dim), matrix)
    return out.reshape(x.shape)


def sign_matrix(transform: Transform, head_dim: int) -> jax.Array | None:
    """A rotation's matrix times `sqrt(head_dim)`, `bf16`; None unless all its values are +-1."""
    with jax.ensure_compile_time_eval():  # a constant of the program, not computed at each step
        matrix = np.asarray(transform(jnp.eye(head_dim, dtype=jnp.float32)))
        if not np.allclose(np.abs(matrix) * head_dim**0.5, 1, atol=1e-3):
            return None
        return jnp.asarray(np.sign(matrix), jnp.bfloat16)


def times_signs(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix` to float32's precision, inside a kernel."""
    count = PARTS.get(x.dtype.name, 3)
    if count == 1:
        return jnp.dot(x, matrix, preferred_element_type=jnp.float32)
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(count):
        bits = jax.lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        rest = jnp.where(jnp.abs(part) <= FLOAT32_MAX, rest - part, 0.0)  # not inf - inf
    dots = [jnp.dot(part, matrix, preferred_element_type=jnp.float32) for part in parts[::-1]]
    return sum(dots[1:], dots[0])


def _kernel(x_ref, matrix_ref, out_ref, *, rows: int, columns: int, scale: float, limit):
    n, head_dim = x_ref.shape
    row = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
    start = pl.program_id(1) * columns
    x = x_ref[jnp.minimum(row, n - 1), pl.ds(0, head_dim)]
    y = times_signs(x, matrix_ref[:, pl.ds(start, columns)]) * scale
    if limit is not None:  # NaN stays NaN: the GPU's min and max would return the limit
        y = jnp.where(y == y, jnp.clip(y, -limit, limit), y)
    column = start + jnp.arange(columns, dtype=jnp.int32)
    real = jnp.broadcast_to((row < n)[:, None], y.shape)
    # Rows past the end must be out of bounds: the interpreter writes to masked places, too.
    place = (jnp.broadcast_to(i, y.shape) for i in (row[:, None], column[None]))
    plgpu.store(out_ref.at[tuple(place)], y.astype(out_ref.dtype), mask=real)
