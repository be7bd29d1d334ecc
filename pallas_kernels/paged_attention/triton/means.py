"""Scores of key means, for codecs that subtract a mean from keys before they quantize them.

`q . (k + mean)` is `q . k`, computed from codes, plus `q . mean`, one number per page and row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.triton.address import Address
from pallas_kernels.paged_attention.triton.axes import Axes, dot, row_index
from pallas_kernels.paged_attention.triton.case import Case
from pallas_kernels.paged_attention.triton.readers import split_columns
from pallas_kernels.paged_attention.triton.span import Bounds

MEAN_PAGES = 16  # pages per program: the fewest rows that a dot takes


def mean_scores(
    q, mean, bounds: Bounds, layer, table, case: Case, *, rows: int, pages: int, interpret: bool
) -> jax.Array:
    """`q . mean` of every page that is read, `f32[batch, kv_heads, width, rows]`; others are unset.

    Args:
      q: `[batch, q_tokens, q_heads, head_dim]`, rotated.
      mean: `f16[layers, pages, kv_heads, head_dim]`; a pages axis of size 1 is one mean for all.
      bounds: which entries some query sees.
      layer: `i32[1]`.
      table: `i32[batch, width]`, sink pages included.
      case: static facts of the call.
      rows: query rows per kv head, padding included.
      pages: most pages that one sequence reads.
      interpret: run on the CPU.
    """
    batch, width = table.shape
    kv_heads = mean.shape[2]
    return pl.pallas_call(
        functools.partial(_mean_kernel, case=case, rows=rows),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, width, rows), jnp.float32),
        grid=(kv_heads, pl.cdiv(pages, MEAN_PAGES), batch),
        compiler_params=plgpu.CompilerParams(num_warps=1 if rows <= 32 else 4, num_stages=1),
        interpret=interpret,
        name="paged_attention_mean",
    )(layer, bounds, table, q, mean)


def _mean_kernel(
    layer_ref,  # i32[1]
    bounds: Bounds,  # each a ref
    table_ref,  # i32[batch, width]
    q_ref,  # [batch, q_tokens, q_heads, head_dim]
    mean_ref,  # f16[layers, pages, kv_heads, head_dim]
    bias_ref,  # f32[batch, kv_heads, width, rows]
    *,
    case: Case,
    rows: int,
):
    h, b, layer = pl.program_id(0), pl.program_id(2), layer_ref[0]
    span = case.find_span(bounds.of(b))
    start = pl.program_id(1) * MEAN_PAGES

    @pl.when(start < span.pages)
    def _():
        row_token, row_head = row_index(rows, group=case.group, q_tokens=case.q_tokens)
        row_head = row_head + h * case.group
        ordinal = start + jnp.arange(MEAN_PAGES, dtype=jnp.int32)
        inside = ordinal < span.pages
        logical = span.position(ordinal * case.page_size, case.page_size) // case.page_size
        slot = case.table_slot(logical, table_ref)
        page = plgpu.load(table_ref.at[b, slot], mask=inside, other=0)
        if mean_ref.shape[1] == 1:  # one mean for all pages
            page = jnp.zeros_like(page)
        s = jnp.zeros((MEAN_PAGES, rows), jnp.float32)
        for part, size in split_columns(mean_ref.shape[3]):
            q = q_ref[b, row_token, row_head, pl.ds(part, size)]
            shape = (MEAN_PAGES, size)
            column = part + jnp.arange(size, dtype=jnp.int32)
            pages, column = (jnp.broadcast_to(x, shape) for x in (page[:, None], column[None]))
            mean = plgpu.load(
                mean_ref.at[layer, pages, h, column],
                mask=jnp.broadcast_to(inside[:, None], shape),
                other=jnp.zeros((), mean_ref.dtype),
            )
            s = s + dot(mean.astype(q.dtype), q.T)
        row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[None], s.shape)
        # Masked entries must be out of bounds: the interpreter writes to masked places, too.
        slot = jnp.where(inside, slot, bias_ref.shape[2])
        plgpu.store(
            bias_ref.at[b, h, jnp.broadcast_to(slot[:, None], s.shape), row],
            s,
            mask=jnp.broadcast_to(inside[:, None], s.shape),
        )


def load_bias(bias_ref, b, address: Address, axes: Axes, rows: int):
    """Loads `bias[b, kv head, slot of the table, row]` in a shape that adds to a tile of scores."""
    if jnp.ndim(address.page) == 0:
        return axes.by_row(bias_ref[b, address.head, address.place, pl.ds(0, rows)])
    shape = axes.shape(rows, address.tokens)
    slot = jnp.broadcast_to(axes.by_token(address.place), shape)
    row = jnp.broadcast_to(axes.by_row(jnp.arange(rows, dtype=jnp.int32)), shape)
    at = bias_ref.at[b, address.head, slot, row]
    if address.inside is None:
        return plgpu.load(at)
    inside = jnp.broadcast_to(axes.by_token(address.inside), shape)
    return plgpu.load(at, mask=inside, other=0.0)
