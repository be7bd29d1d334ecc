"""Scores of the pages' means on GPUs: keys of `tq` codecs are kept less a mean of their page.

`q . (k + mean)` is `q . k`, from codes, and `q . mean`, one number for a page and a row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.gpu_case import (
    Axes,
    Case,
    dot,
    read_span,
    row_index,
    table_slot,
)
from pallas_kernels.paged_attention.gpu_dequant import Where, split_columns
from pallas_kernels.paged_attention.gpu_tiles import DecodeConfig

MEAN_PAGES = 16  # of a program: a dot's least rows


def mean_scores(q, mean, scalars, case: Case, config: DecodeConfig, *, pages, interpret):
    """`q . mean` of every page that is read: `f32[batch, kv_heads, width, rows]`, others unset."""
    rows = max(8 if config.transposed else 16, pl.next_power_of_2(case.rows))
    names = ("layer", "q_start", "kv_start", "kv_stop", "sink_start", "sink_stop", "table")
    refs = {name: scalars[name] for name in names if name in scalars} | dict(q=q, mean=mean)
    batch, width = scalars["table"].shape
    kv_heads = mean.shape[2]
    [bias] = pl.pallas_call(
        functools.partial(_mean_kernel, names=tuple(refs), case=case, rows=rows),
        out_shape=[jax.ShapeDtypeStruct((batch, kv_heads, width, rows), jnp.float32)],
        grid=(kv_heads, pl.cdiv(pages, MEAN_PAGES), batch),
        compiler_params=plgpu.CompilerParams(num_warps=1 if rows <= 32 else 4, num_stages=1),
        interpret=interpret,
        name="paged_attention_mean",
    )(*refs.values())
    return bias


def _mean_kernel(*args, names, case: Case, rows: int):
    refs = dict(zip(names, args, strict=False))
    bias_ref = args[len(names)]
    h, b, layer = pl.program_id(0), pl.program_id(2), refs["layer"][0]
    span = read_span(refs, b, case)
    start = pl.program_id(1) * MEAN_PAGES

    @pl.when(start < span.pages)
    def _():
        row_token, row_head = row_index(rows, case)
        row_head = row_head + h * case.group
        ordinal = start + jnp.arange(MEAN_PAGES, dtype=jnp.int32)
        inside = ordinal < span.pages
        logical = span.position(ordinal * case.page_size, case.page_size) // case.page_size
        slot = table_slot(logical, refs, case)
        page = plgpu.load(refs["table"].at[b, slot], mask=inside, other=0)
        if refs["mean"].shape[1] == 1:  # one for all pages
            page = jnp.zeros_like(page)
        s = jnp.zeros((MEAN_PAGES, rows), jnp.float32)
        for part, size in split_columns(refs["mean"].shape[3]):
            q = refs["q"][b, row_token, row_head, pl.ds(part, size)]
            shape = (MEAN_PAGES, size)
            column = part + jnp.arange(size, dtype=jnp.int32)
            pages, column = (jnp.broadcast_to(x, shape) for x in (page[:, None], column[None]))
            mean = plgpu.load(
                refs["mean"].at[layer, pages, h, column],
                mask=jnp.broadcast_to(inside[:, None], shape),
                other=jnp.zeros((), refs["mean"].dtype),
            )
            s = s + dot(mean.astype(q.dtype), q.T)
        row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[None], s.shape)
        # Out of bounds where masked: the interpreter would store what stood there.
        slot = jnp.where(inside, slot, bias_ref.shape[2])
        plgpu.store(
            bias_ref.at[b, h, jnp.broadcast_to(slot[:, None], s.shape), row],
            s,
            mask=jnp.broadcast_to(inside[:, None], s.shape),
        )


def load_bias(bias_ref, b, where: Where, axes: Axes, rows: int):
    """Scores of the pages' means, ready to be added: `bias[b, h, slot of the table, row]`."""
    if jnp.ndim(where.page) == 0:
        return axes.by_row(bias_ref[b, where.head, where.place, pl.ds(0, rows)])
    shape = axes.shape(rows, where.tokens)
    slot = jnp.broadcast_to(axes.by_token(where.place), shape)
    row = jnp.broadcast_to(axes.by_row(jnp.arange(rows, dtype=jnp.int32)), shape)
    at = bias_ref.at[b, where.head, slot, row]
    if where.inside is None:
        return plgpu.load(at)
    inside = jnp.broadcast_to(axes.by_token(where.inside), shape)
    return plgpu.load(at, mask=inside, other=0.0)
