"""One call of the attention kernel: prepares operands, launches it, and puts results in order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.codecs.factors import FLOAT16_MAX
from pallas_kernels.device import H100_SMS, count_sms
from pallas_kernels.layouts.plain import Plain
from pallas_kernels.layouts.token_major import TokenMajor
from pallas_kernels.paged_attention.triton.base2 import LOG2E
from pallas_kernels.paged_attention.triton.case import Case
from pallas_kernels.paged_attention.triton.kernel import decode_kernel
from pallas_kernels.paged_attention.triton.means import mean_scores
from pallas_kernels.paged_attention.triton.merge import combine
from pallas_kernels.paged_attention.triton.operands import Inputs, Outputs
from pallas_kernels.paged_attention.triton.readers import (
    PlanesReader,
    Reader,
    coded_reader,
    exact_reader,
)
from pallas_kernels.paged_attention.triton.softmax import padded_rows
from pallas_kernels.paged_attention.triton.span import Bounds
from pallas_kernels.paged_attention.triton.tile_sizes import DecodeConfig, choose_config
from pallas_kernels.paged_attention.triton.work_list import WorkList, choose_shares, plan_work
from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, Queries, Segment, seen_spans
from pallas_kernels.triton.rotation import rotate_rows

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PAGE_SIZES = (16, 32, 64, 128)
MOST_ROWS = 128  # most query rows per kv head: its query heads times query tokens


def paged_attention(
    queries: Queries,
    pages: Pages,
    segment: Segment,
    *,
    rule: Rule,
    layer,
    scale,
    soft_cap,
    out_dtype,
    interpret: bool = False,
    config: DecodeConfig | None = None,
) -> Part:
    """See `api.paged_attention`; serves up to `MOST_ROWS` query rows per kv head.

    `config` replaces the tile sizes that `tile_sizes` would choose.

    Raises:
      NotImplementedError: a shape or codec that this kernel does not serve.
    """
    group = queries.q.shape[2] // pages.dims["kv_heads"]
    if (reason := refusal(pages, q_tokens=queries.q.shape[1], group=group)) is not None:
        raise NotImplementedError(f"{reason}.")
    case, config = _make_case(queries, pages, segment, rule, scale, soft_cap, interpret, config)
    table, most_pages = _whole_table(queries, segment, rule, case)
    seen = seen_spans(queries, segment, rule, case.page_size)
    bounds = Bounds(q_start=queries.start, run=seen.run, sinks=seen.sinks)
    batch, kv_heads = len(table), pages.dims["kv_heads"]
    shares = choose_shares(
        config,
        batch=batch,
        kv_heads=kv_heads,
        page_size=case.page_size,
        most_pages=most_pages,
        sms=H100_SMS if interpret else count_sms(),
    )
    work = None if shares is None else plan_work(bounds, case.find_span, shares, interpret)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    q, bias, codec = queries.q, None, pages.layout.codec
    if not isinstance(pages.layout, Plain):
        q = rotate_rows(
            q,
            codec.key.rotate,
            scale=scale * LOG2E,
            limit=FLOAT16_MAX,
            out_dtype=case.k.dtype,
            interpret=interpret,
        )
        if pages.key_mean is not None:
            rows = padded_rows(case, config)
            bias = mean_scores(
                q,
                pages.key_mean,
                bounds,
                layer,
                table,
                case,
                rows=rows,
                pages=most_pages,
                interpret=interpret,
            )
        q = _permute(q, np.concatenate(case.k.dims))
    inputs = Inputs(
        bounds=bounds,
        layer=layer,
        q_lens=queries.lens,
        table=table,
        work=work,
        bias=bias,
        q=q,
        **_stored(pages.arrays, case.k, case.v),
    )
    kernel_dtype = out_dtype if isinstance(pages.layout, Plain) else jnp.float32
    programs = batch if shares is None else shares.programs
    new = _launch(inputs, case, config, programs, out_dtype=kernel_dtype, interpret=interpret)
    out, lse = _merged(new, work, interpret)
    out = _permute(out, np.argsort(np.concatenate(case.v.dims)))
    if not isinstance(pages.layout, Plain):
        out = rotate_rows(out, codec.value.unrotate, out_dtype=out_dtype, interpret=interpret)
    return Part(out.astype(out_dtype), lse)


def refusal(pages: Pages, *, q_tokens: int, group: int) -> str | None:
    """Why this kernel does not serve a call, in words; None if it does."""
    head_dim, page_size = pages.dims["head_dim"], pages.dims["page_size"]
    try:
        _readers(pages)
    except NotImplementedError as error:
        return str(error).rstrip(".")
    if head_dim not in HEAD_DIMS:
        return f"{head_dim=}: the GPU kernel serves {HEAD_DIMS}"
    if page_size not in PAGE_SIZES:
        return f"{page_size=}: the GPU kernel serves {PAGE_SIZES}"
    if group > MOST_ROWS:
        return f"{group=}: the GPU kernel serves up to {MOST_ROWS} query heads"
    if group * q_tokens > MOST_ROWS:
        return f"{group=}, {q_tokens=}: their product exceeds {MOST_ROWS}"
    for name, array in pages.arrays.items():
        # Pallas indexes pools of up to 4 GiB by signed 32-bit numbers.
        if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
            return f"{name}.size={array.size}: 2 to 4 GiB of 1-byte values are not served"
    return None


def default_config(pages: Pages, *, rows: int, window: int | None = None) -> DecodeConfig:
    """Tile sizes that `paged_attention` uses by default for `rows` query rows per kv head."""
    return choose_config(*_readers(pages), rows, window)


def _make_case(
    queries: Queries, pages: Pages, segment: Segment, rule: Rule, scale, soft_cap, interpret, config
) -> tuple[Case, DecodeConfig]:
    """Static facts of a call, and its tile sizes: `config`, or the measured ones if it is None."""
    _, q_tokens, q_heads, _ = queries.q.shape
    k, v = _readers(pages)
    group = q_heads // pages.dims["kv_heads"]
    config = config or choose_config(k, v, group * q_tokens, rule.window)
    sink_pages = 0 if segment.sinks is None else segment.sinks.shape[1]
    layout = pages.layout
    k_factors, v_factors = layout.factor_places if isinstance(layout, TokenMajor) else ((), ())
    case = Case(
        k=k if "k" in config.lookups else k.computed(),
        v=v if "v" in config.lookups else v.computed(),
        k_factors=k_factors,
        v_factors=v_factors,
        page_size=pages.dims["page_size"],
        group=group,
        q_tokens=q_tokens,
        score_scale=scale * LOG2E if isinstance(layout, Plain) else 1.0,
        rule=rule,
        sink_pages=sink_pages,
        soft_cap=soft_cap,
        asm=not interpret,
    )
    return case, config


def _readers(pages: Pages) -> tuple[Reader, Reader]:
    """Readers of keys and of values.

    Raises:
      NotImplementedError: a layout or codec that the kernel does not read.
    """
    layout, arrays = pages.layout, pages.arrays
    if isinstance(layout, Plain):
        k, v = (exact_reader(side, layout.head_dim, arrays["k"].dtype) for side in "kv")
        return k, v
    if not isinstance(layout, TokenMajor):
        raise NotImplementedError(
            f"{type(layout).__name__}: the GPU kernel reads TokenMajor pages."
        )
    k = coded_reader("k", layout.codec.key, layout.head_dim, arrays)
    v = coded_reader("v", layout.codec.value, layout.head_dim, arrays)
    return k, v


def _whole_table(queries: Queries, segment: Segment, rule: Rule, case: Case):
    """The table with sink pages in front, and the most pages that one sequence reads."""
    most_pages = segment.table.shape[1]
    seen_pages = rule.most_pages(queries.q.shape[1], case.page_size)
    if seen_pages is not None and (segment.sinks is not None or not rule.sink_tokens):
        most_pages = min(most_pages, seen_pages)
    if segment.sinks is None:
        return segment.table, most_pages
    table = jnp.concatenate([segment.sinks, segment.table], axis=1)
    return table, most_pages + segment.sinks.shape[1]


def _stored(arrays: dict[str, jax.Array], *sides: Reader) -> dict:
    """Operands of `Inputs` that depend on the readers: pools in the kernel's dtypes, and shifts."""
    stored: dict = dict(pools=dict(arrays))
    for side, reader in zip("kv", sides, strict=True):
        if isinstance(reader, PlanesReader):
            if reader.shifts.any():
                stored[f"{side}_shifts"] = jnp.asarray(reader.shifts)
        elif arrays[reader.arrays[0]].dtype != reader.stored:
            [name] = reader.arrays  # float8, which pools keep as bytes
            stored["pools"][name] = jax.lax.bitcast_convert_type(arrays[name], reader.stored)
    return stored


def _launch(
    inputs: Inputs, case: Case, config: DecodeConfig, programs: int, *, out_dtype, interpret: bool
) -> Outputs:
    """Runs the kernel: returns results of whole sequences and, with a work list, parts to merge."""
    batch, _, q_heads, head_dim = inputs.q.shape
    kv_heads = q_heads // case.group
    part = part_lse = None
    if inputs.work is not None:
        parts = (programs + batch, kv_heads, case.rows)
        part = jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32)
        part_lse = jax.ShapeDtypeStruct(parts, jnp.float32)
    return pl.pallas_call(
        functools.partial(decode_kernel, case=case, config=config),
        out_shape=Outputs(
            out=jax.ShapeDtypeStruct(inputs.q.shape, out_dtype),
            lse=jax.ShapeDtypeStruct(inputs.q.shape[:-1], jnp.float32),
            part=part,
            part_lse=part_lse,
        ),
        grid=(kv_heads, programs),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="paged_attention_decode",
    )(inputs)


def _merged(new: Outputs, work: WorkList | None, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Outputs and lse of all sequences, parts merged; dims still in the value reader's order."""
    if work is None or new.part is None or new.part_lse is None:
        return new.out, new.lse
    where = work.first_part, work.part_count
    return combine(new.part, new.part_lse, *where, new.out, new.lse, interpret=interpret)


def _permute(x: jax.Array, dims: np.ndarray) -> jax.Array:
    """Puts the last axis in the order `dims`; does nothing if it is in that order."""
    return x if np.array_equal(dims, np.arange(x.shape[-1])) else x[..., dims]
