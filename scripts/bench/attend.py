"""The attention op as the benchmarks of one layer call it, and the result that it must give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.triton import call
from pallas_kernels.paged_attention.triton.tile_sizes import DecodeConfig
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Part, Queries, Segment, add_learned_sink
from scripts.bench.fill import Data, make_data
from scripts.bench.problems import Sizes

MAX_ERROR = 3e-3  # relative L2 to the float32 reference on the same stored values


def attend(sizes: Sizes, backend: Backend, data: Data, table, spans, layer) -> jax.Array:
    """The op's output, `f32[batch, 1, q_heads, head_dim]`."""
    queries, segment, rule = _operands(sizes, data, table, spans)
    scale = sizes.workload.head_dim**-0.5
    part = paged_attention(
        queries, data.pages, segment, rule, layer=layer, scale=scale, backend=backend
    )
    return _with_sinks(part, data)


def attend_tiled(sizes: Sizes, config: DecodeConfig, data: Data, table, spans, layer) -> jax.Array:
    """The GPU decode kernel's output with these tile sizes; it is interpreted without a GPU."""
    queries, segment, rule = _operands(sizes, data, table, spans)
    part = call.paged_attention(
        queries,
        data.pages,
        segment,
        rule=rule,
        layer=layer,
        scale=sizes.workload.head_dim**-0.5,
        soft_cap=None,
        out_dtype=jnp.float32,
        interpret=jax.default_backend() != "gpu",
        config=config,
    )
    return _with_sinks(part, data)


def _operands(sizes: Sizes, data: Data, table, spans) -> tuple[Queries, Segment, Rule]:
    queries = Queries(data.q, spans["q_start"], spans["q_lens"])
    segment = Segment(table, spans["kv_start"], spans["kv_stop"])
    return queries, segment, Rule(window=sizes.workload.window)


def _with_sinks(part: Part, data: Data) -> jax.Array:
    """The part's output, with the learned sinks that there are."""
    return part.out if data.sink_logits is None else add_learned_sink(part, data.sink_logits).out


def default_tiles(sizes: Sizes, data: Data) -> DecodeConfig:
    """The tile sizes that the GPU decode kernel takes by itself."""
    shape = sizes.workload
    rows = shape.q_heads // shape.kv_heads
    return call.default_config(data.pages, rows=rows, window=shape.window)


def expected(sizes: Sizes, data: Data, table, spans, layer) -> jax.Array:
    """The reference's output of the first `sizes.checked` sequences."""
    n = sizes.checked
    spans = {name: x[:n] for name, x in spans.items()}
    return attend(sizes, "reference", data._replace(q=data.q[:n]), table[:n], spans, layer)


def abstract_inputs(sizes: Sizes) -> tuple[Data, jax.ShapeDtypeStruct, dict]:
    """The shapes of data, page table and spans, to compile for."""
    data = jax.eval_shape(functools.partial(make_data, sizes), jax.random.key(0))
    integer = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    names = ("q_start", "q_lens", "kv_start", "kv_stop")
    return data, integer(sizes.batch, sizes.width), {n: integer(sizes.batch) for n in names}


def relative_error(found: jax.Array, want: jax.Array) -> float:
    """Largest over sequences of `|found - want| / |want|`; NaN counts as infinite."""
    found = found[: len(want)]
    norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim))))
    error = float(jnp.max(norm(found - want) / norm(want)))
    return error if np.isfinite(error) else float("inf")
