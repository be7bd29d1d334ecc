"""Paged attention on NVIDIA GPUs (Pallas Triton): a few query tokens, exact or coded pages.

One program takes a share of the pages (`gpu_plan`) of one kv head, sequence by sequence: it loads
a block of tokens, turns words into dot operands in registers (`gpu_dequant`), and keeps an online
softmax in base 2. Scale and zero of a token enter as a factor on scores and probabilities and a
rank-1 sum, so codes are never dequantized one by one. Blocks that all rows see whole carry no mask.
"""

import functools
import operator
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.gpu_rotation import rotate_rows
from pallas_kernels.paged_attention.gpu_blocks import Item, blocks_of
from pallas_kernels.paged_attention.gpu_case import Axes, Case, find_span, read_span, row_index
from pallas_kernels.paged_attention.gpu_dequant import (
    PlanesReader,
    Reader,
    coded_reader,
    exact_reader,
    exp2,
    factor_value,
)
from pallas_kernels.paged_attention.gpu_means import load_bias, mean_scores
from pallas_kernels.paged_attention.gpu_plan import choose_shares, plan_work
from pallas_kernels.paged_attention.gpu_split import LN2, NOTHING_SEEN, combine
from pallas_kernels.paged_attention.gpu_tiles import DecodeConfig, choose_config, count_sms
from pallas_kernels.pages import CodedPages, Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, Queries, Segment, seen_spans

if TYPE_CHECKING:  # codecs lie above the kernels
    from jaxkv.codecs.token_major import TokenMajor

LOG2E = 1.4426950408889634
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PAGE_SIZES = (16, 32, 64, 128)
MOST_ROWS = 128  # query heads of a kv head times query tokens
FLOAT16_MAX = 65504.0
# float16 probabilities are up to 2^4, not 1: small ones keep their bits, and factors up to 4094
# fit beside them (larger ones saturate, as those of a token that is not finite do).
FLOAT16_OFFSET = 4.0


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
    """See `api.paged_attention`.

    Raises:
      NotImplementedError: a shape or codec that this kernel does not serve.
    """
    dims = pages.dims
    coded = isinstance(pages, CodedPages)
    q = queries.q
    batch, q_tokens, q_heads, head_dim = q.shape
    kv_heads, page_size = dims["kv_heads"], dims["page_size"]
    group = q_heads // kv_heads
    k, v, arrays, factors = _readers(pages, head_dim)
    config = config or choose_config(k, v, group * q_tokens, rule.window)
    k = k if "k" in config.lookups else k.computed()
    v = v if "v" in config.lookups else v.computed()
    _check(head_dim, page_size, group, q_tokens, arrays)

    page_table, most_pages, sink_pages = segment.table, segment.table.shape[1], 0
    seen_pages = rule.most_pages(q_tokens, page_size)
    if seen_pages is not None and (segment.sinks is not None or not rule.sink_tokens):
        most_pages = min(most_pages, seen_pages)
    if segment.sinks is not None:
        sink_pages = segment.sinks.shape[1]
        most_pages += sink_pages
        page_table = jnp.concatenate([segment.sinks, page_table], axis=1)
    shares = choose_shares(
        config,
        batch=batch,
        kv_heads=kv_heads,
        page_size=page_size,
        most_pages=most_pages,
        sms=count_sms(interpret),
    )
    case = Case(
        k=k,
        v=v,
        k_factors=factors[0],
        v_factors=factors[1],
        has_mean=coded and pages.key_mean is not None,
        page_size=page_size,
        group=group,
        q_tokens=q_tokens,
        score_scale=1.0 if coded else scale * LOG2E,
        rule=rule,
        sink_pages=sink_pages,
        soft_cap=soft_cap,
        direct=shares is None,
        asm=not interpret,
    )
    seen = seen_spans(queries, segment, rule, page_size)
    spans = dict(q_start=queries.start, kv_start=seen.run.start, kv_stop=seen.run.stop)
    if seen.sinks is not None:
        spans |= dict(sink_start=seen.sinks.start, sink_stop=seen.sinks.stop)
    scalars = spans | dict(
        layer=jnp.asarray(layer, jnp.int32).reshape(1), q_lens=queries.lens, table=page_table
    )
    work = None
    if shares is not None:
        work = plan_work(spans, functools.partial(find_span, case=case), shares, interpret)
        scalars |= work._asdict()
    if coded:
        q = rotate_rows(
            q,
            pages.layout.codec.key.rotate,
            scale=scale * LOG2E,
            limit=FLOAT16_MAX,
            out_dtype=k.dtype,
            interpret=interpret,
        )
        if case.has_mean:
            scalars["bias"] = mean_scores(
                q, pages.key_mean, scalars, case, config, pages=most_pages, interpret=interpret
            )
        q = _permute(q, np.concatenate(k.dims))
    inputs = scalars | dict(q=q) | _stored(arrays, k, v)
    programs = shares.programs if shares is not None else batch
    kernel_dtype = jnp.float32 if coded else out_dtype
    new = _launch(inputs, case, config, programs, out_dtype=kernel_dtype, interpret=interpret)
    out, lse = new["out"], new["lse"]
    if work is not None:
        part, part_lse, count = new["part"], new["part_lse"], work.part_count
        out, lse = combine(part, part_lse, work.first_part, count, out, lse, interpret=interpret)
    out = _permute(out, np.argsort(np.concatenate(v.dims)))
    if coded:
        unrotate = pages.layout.codec.value.unrotate
        out = rotate_rows(out, unrotate, out_dtype=out_dtype, interpret=interpret)
    return Part(out.astype(out_dtype), lse)


def _stored(arrays: dict[str, jax.Array], *sides: Reader) -> dict[str, jax.Array]:
    """The pools as the kernel reads them, and the shifts of words that hold a third bit."""
    arrays = dict(arrays)
    for side, reader in zip("kv", sides, strict=True):
        if isinstance(reader, PlanesReader):
            if reader.shifts.any():
                arrays[f"{side}_shifts"] = jnp.asarray(reader.shifts)
        elif arrays[reader.arrays[0]].dtype != reader.stored:
            [name] = reader.arrays  # float8 that is kept as bytes
            arrays[name] = jax.lax.bitcast_convert_type(arrays[name], reader.stored)
    return arrays


def _launch(
    inputs, case: Case, config: DecodeConfig, programs: int, *, out_dtype, interpret: bool
) -> dict[str, jax.Array]:
    """Runs the kernel: `out` and `lse` of whole sequences, and unless `direct` parts of others."""
    batch, _, q_heads, head_dim = inputs["q"].shape
    kv_heads = q_heads // case.group
    shapes = dict(
        out=jax.ShapeDtypeStruct(inputs["q"].shape, out_dtype),
        lse=jax.ShapeDtypeStruct(inputs["q"].shape[:-1], jnp.float32),
    )
    if not case.direct:
        parts = (programs + batch, kv_heads, case.rows)
        shapes["part"] = jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32)
        shapes["part_lse"] = jax.ShapeDtypeStruct(parts, jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, names=(*inputs, *shapes), case=case, config=config),
        out_shape=list(shapes.values()),
        grid=(kv_heads, programs),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="paged_attention_decode",
    )(*inputs.values())
    return dict(zip(shapes, out, strict=True))


def default_config(pages: Pages, *, rows: int, window: int | None = None) -> DecodeConfig:
    """Tile sizes that `paged_attention` takes by itself for `rows` query rows a kv head."""
    k, v, _, _ = _readers(pages, pages.dims["head_dim"])
    return choose_config(k, v, rows, window)


def check(pages: Pages, *, q_tokens: int, group: int) -> None:
    """Raises NotImplementedError, with name and value, for what this kernel does not serve."""
    dims = pages.dims
    _, _, arrays, _ = _readers(pages, dims["head_dim"])
    _check(dims["head_dim"], dims["page_size"], group, q_tokens, arrays)


def _readers(pages: Pages, head_dim: int):
    """Readers of keys and values, the arrays they read, and where each side's factors stand."""
    if not isinstance(pages, CodedPages):
        arrays = dict(k=pages.k, v=pages.v)
        readers = (exact_reader(side, head_dim, pages.k.dtype) for side in "kv")
        return *readers, arrays, ((), ())
    layout, arrays = pages.layout, pages.arrays
    if not hasattr(layout, "factor_places"):  # its class lies above the kernels
        raise NotImplementedError(
            f"{type(layout).__name__}: the GPU kernel reads TokenMajor pages."
        )
    k = coded_reader("k", layout.codec.key, head_dim, arrays)
    v = coded_reader("v", layout.codec.value, head_dim, arrays)
    return k, v, arrays, cast("TokenMajor", layout).factor_places


def _check(head_dim, page_size, group, q_tokens, arrays):
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"{head_dim=}: the GPU kernel serves {HEAD_DIMS}.")
    if page_size not in PAGE_SIZES:
        raise NotImplementedError(f"{page_size=}: the GPU kernel serves {PAGE_SIZES}.")
    if group > MOST_ROWS:
        raise NotImplementedError(f"{group=}: the GPU kernel serves up to {MOST_ROWS} query heads.")
    if group * q_tokens > MOST_ROWS:
        raise NotImplementedError(f"{group=}, {q_tokens=}: their product exceeds {MOST_ROWS}.")
    for name, array in arrays.items():
        # Pallas counts elements in 32 signed bits up to 4 GiB.
        if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
            raise NotImplementedError(
                f"{name}.size={array.size}: 2 to 4 GiB of 1-byte values are not served."
            )


def _permute(x: jax.Array, dims: np.ndarray) -> jax.Array:
    """Picks `dims` of the last axis; nothing where they are in order already."""
    return x if np.array_equal(dims, np.arange(x.shape[-1])) else x[..., dims]


def _kernel(*args, names, case: Case, config: DecodeConfig):
    """A program: a sequence, or its stretch of all sequences' pages, one after the other."""
    refs = dict(zip(names, args, strict=True))
    h, program = pl.program_id(0), pl.program_id(1)
    attend = functools.partial(_attend, refs, h, case=case, config=config)
    if case.direct:
        span = read_span(refs, program, case)
        attend(Item(program, jnp.int32(0), span.pages, span, None))
        return
    low, high = refs["low"][program], refs["high"][program]

    def step(k, _):
        b, before = refs["sequence"][k], refs["before"][k]
        span = read_span(refs, b, case)
        start = jnp.maximum(low - before, 0)
        stop = jnp.minimum(high - before, span.pages)
        attend(Item(b, start, stop, span, program + k))

    jax.lax.fori_loop(refs["first"][program], refs["stop"][program], step, None)


def _attend(refs, h, item: Item, *, case: Case, config: DecodeConfig):
    """Attends an item's pages and stores the result of kv head `h`'s rows."""
    b, layer = item.b, refs["layer"][0]
    kv_start, kv_stop = refs["kv_start"][b], refs["kv_stop"][b]
    q_start, q_len = refs["q_start"][b], refs["q_lens"][b]
    axes = Axes(config.transposed)
    rows = max(8 if config.transposed else 16, pl.next_power_of_2(case.rows))
    row_token, row_head = row_index(rows, case)
    row_head = row_head + h * case.group
    q = [
        refs["q"][b, row_token, row_head, pl.ds(int(start), size)].astype(case.k.dtype)
        for start, size in _columns(case.k)
    ]
    k_refs, v_refs = ([refs[name] for name in side.arrays] for side in (case.k, case.v))
    k_shifts = case.k.load_shifts(refs.get("k_shifts"))
    v_shifts = case.v.load_shifts(refs.get("v_shifts"), dims_first=axes.transposed)
    offset = FLOAT16_OFFSET if case.v.dtype == "float16" else 0.0
    row_sum = None  # what a key's zero point is multiplied by
    if len(case.k_factors) > 1:
        row_sum = axes.by_row(sum(jnp.sum(x.astype(jnp.float32), axis=1) for x in q))
    k_gains = case.k.gains(case.asm)
    # The dots' sum has one gain: what the others' differ by, a power of two, goes into q.
    q = [x if g == k_gains[0] else x * (g / k_gains[0]) for x, g in zip(q, k_gains, strict=True)]

    blocks = blocks_of(
        item, refs, case, size=config.block, head=h, layer=layer, kv_span=(kv_start, kv_stop)
    )

    def sees(positions, inside):
        """Which row sees which token, in the orientation of the scores."""
        if not case.masks_rows:
            return axes.by_token(inside)
        i, j = axes.by_row(q_start + row_token), axes.by_token(positions)
        seen = case.rule.seen(i, j, pinned=case.sink_pages * case.page_size)
        return seen & axes.by_token(inside) & axes.by_row(row_token < q_len)

    def load_factors(where):
        """Words of factors as stored, by array and row: each once, whoever shares it."""
        words = dict.fromkeys((x.array, x.row) for x in case.k_factors + case.v_factors)
        return {(name, row): where.load_factor(refs[name], row) for name, row in words}

    def attend(i, state, masked, page):
        m, l, zero_sum, accs = state
        where, positions, inside = blocks.locate(i, page, masked=masked)
        factors = load_factors(where) if config.early_factors else None
        k_words = case.k.load(k_refs, where)
        v_words = case.v.load(v_refs, where, dims_first=axes.transposed)
        k_gain = k_gains[0] * case.score_scale
        operands = case.k.operands(k_words, case.asm, k_shifts)
        # Lazily, each dot beside its addition: Triton's registers hang on the order.
        s = functools.reduce(operator.add, map(axes.scores, operands, q))
        words = load_factors(where) if factors is None else factors
        k_factors, v_factors = (
            [factor_value(words[x.array, x.row], x.half) for x in side]
            for side in (case.k_factors, case.v_factors)
        )
        if k_factors:
            s = s * axes.by_token(k_factors[0] * k_gain)
        elif k_gain != 1.0:
            s = s * k_gain
        if row_sum is not None:
            s = s + axes.by_token(k_factors[1]) * row_sum
        if case.has_mean:
            s = s + load_bias(refs["bias"], b, where, axes, rows)
        if case.soft_cap is not None:
            cap = case.soft_cap * LOG2E
            s = cap * jnp.tanh(s * (1.0 / cap))
        if masked:
            ok = sees(positions, inside)
            s = jnp.where(ok, s, NOTHING_SEEN)
        m_new = jnp.maximum(m, jnp.max(s, axis=axes.tokens))
        shrink = exp2(m - m_new, case.asm)
        p = exp2(s - axes.by_row(m_new - offset), case.asm)
        if masked:
            p = jnp.where(ok, p, 0.0)
        l = axes.add(l, shrink, p)
        if v_factors:
            if len(v_factors) > 1:
                zero = axes.by_token(v_factors[1])
                zero_sum = axes.add(zero_sum, shrink, p * zero)
            factor = jnp.minimum(v_factors[0], FLOAT16_MAX / 2.0**offset)
            p = p * axes.by_token(factor)
        p = p.astype(case.v.dtype)
        values = case.v.operands(v_words, case.asm, v_shifts, dims_first=axes.transposed)
        accs = tuple(
            acc * axes.by_row(shrink) + axes.outputs(p, v_part)
            for acc, v_part in zip(accs, values, strict=True)
        )
        return m_new, l, zero_sum, accs

    def run(start, stop, state, *, masked, number=lambda e: e):
        """Attends blocks `number(e)`, `start <= e < stop`.

        Each step looks the next one's page up. Triton copies words ahead by as many steps as stages
        are left after the loads that their addresses wait for: with the page among these, three
        stages copied nothing ahead.
        """
        page_of_start = blocks.look_up(number(start))
        if refs["table"].shape[1] == 1:
            # Triton moves what no step changes out of the loop, and then trips over the carry.
            step = lambda e, state: attend(number(e), state, masked, page_of_start)
            return jax.lax.fori_loop(start, stop, step, state)

        def step_ahead(e, carry):
            state, page = carry
            ahead = blocks.look_up(number(jnp.minimum(e + 1, stop - 1)))
            return attend(number(e), state, masked, page), ahead

        return jax.lax.fori_loop(start, stop, step_ahead, (state, page_of_start))[0]

    state = (
        jnp.full((rows,), NOTHING_SEEN, jnp.float32),
        axes.no_sum(rows, config.block),
        axes.no_sum(rows, config.block),
        tuple(jnp.zeros(axes.shape(rows, size), jnp.float32) for _, size in _columns(case.v)),
    )
    sinks = case.sink_pages or (case.rule.window is not None and case.rule.sink_tokens)
    count = blocks.count
    if config.mask_all or sinks:
        state = run(0, count, state, masked=True)
    else:
        low, high = kv_start, kv_stop
        if case.q_tokens > 1:  # a single query sees all of its span
            low, high = case.rule.seen_by_all(q_start, q_len, low, high)
        first, length = blocks.first, blocks.length
        whole_start = jnp.clip(pl.cdiv(jnp.maximum(low - first, 0), config.block), 0, count)
        whole_stop = jnp.minimum(high - first, length) // config.block
        whole_stop = jnp.clip(whole_stop, whole_start, count)
        state = run(whole_start, whole_stop, state, masked=False)
        edge = lambda e: jnp.where(e < whole_start, e, e - whole_start + whole_stop)
        edges = whole_start + count - whole_stop
        state = run(0, edges, state, masked=True, number=edge)

    m, l, zero_sum, accs = state
    state = m - offset, axes.total(l), axes.total(zero_sum), accs
    _store(refs, h, item, state, row_token < q_len, axes=axes, case=case)


def _store(refs, h, item: Item, state, counts, *, axes: Axes, case: Case):
    """Stores outputs and log-sum-exps of the rows; `counts` says which have a query.

    A sequence's only part is its result, and is not merged.
    """
    m, l, zero_sum, accs = state
    [rows] = l.shape
    seen = (l > 0) & counts
    total = jnp.where(seen, l, 1.0)
    norm = jnp.where(seen, 1.0 / total, 0.0)
    row = jnp.arange(rows, dtype=jnp.int32)
    # Padding rows are masked, and out of bounds as well: the interpreter would store them.
    real = row < case.rows
    lse = jnp.where(seen, m + jnp.log2(total), NOTHING_SEEN)
    natural = jnp.where(seen, lse * LN2, -jnp.inf)
    at = (item.b, row // case.group, row % case.group + h * case.group)
    targets = [(refs["out"], refs["lse"], at, natural, real)]
    if item.part is not None:
        whole = refs["part_count"][item.b] == 1
        targets = [
            (refs["out"], refs["lse"], at, natural, real & whole),
            (refs["part"], refs["part_lse"], (item.part, h, row), lse, real & ~whole),
        ]
    for _, lse_ref, place, value, mask in targets:
        plgpu.store(lse_ref.at[place], value, mask=mask)
    for acc, gain, (start, size) in zip(
        accs, case.v.gains(case.asm), _columns(case.v), strict=True
    ):
        acc = acc * gain
        if len(case.v_factors) > 1:
            acc = acc + axes.by_row(zero_sum)
        y = jnp.where(axes.by_row(seen), acc * axes.by_row(norm), 0.0)
        y = y.T if axes.transposed else y
        column = int(start) + jnp.arange(size, dtype=jnp.int32)
        column = jnp.broadcast_to(column[None], y.shape)
        for out_ref, _, place, _, mask in targets:
            place = (x if jnp.ndim(x) == 0 else _spread(x, y.shape) for x in place)
            mask = _spread(mask, y.shape)
            plgpu.store(out_ref.at[(*place, column)], y.astype(out_ref.dtype), mask=mask)


def _spread(x, shape):
    """A row's number at each of its columns."""
    return jnp.broadcast_to(x[:, None], shape)


def _columns(reader: Reader) -> list[tuple[int, int]]:
    """`(start, size)` of each operand in the reader's order of dims."""
    sizes = [len(dims) for dims in reader.dims]
    return list(zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True))
