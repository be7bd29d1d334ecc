"""The attention op as the benchmarks of one layer call it, and the result that it must give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import gpu_decode, paged_attention
from pallas_kernels.paged_attention.gpu_tiles import DecodeConfig
from pallas_kernels.segments import add_learned_sink
from pallas_kernels.visibility import seen_span
from scripts.bench.fill import Data, make_data
from scripts.bench.problems import Sizes

MAX_ERROR = 3e-3  # relative L2 to the float32 reference on the same stored values


def attend(sizes: Sizes, backend: Backend, data: Data, table, spans, layer) -> jax.Array:
    """The op's output, `f32[batch, 1, q_heads, head_dim]`."""
    return paged_attention(
        data.q,
        data.pages,
        table,
        layer=layer,
        **spans,
        scale=sizes.workload.head_dim**-0.5,
        window=sizes.workload.window,
        sink_logits=data.sink_logits,
        backend=backend,
    )[0]


def attend_tiled(sizes: Sizes, config: DecodeConfig, data: Data, table, spans, layer) -> jax.Array:
    """The GPU decode kernel's output with these tile sizes; it is interpreted without a GPU."""
    shape = sizes.workload
    spans = dict(spans)
    names = ("q_start", "q_lens", "kv_start", "kv_stop")
    spans["kv_start"], spans["kv_stop"] = seen_span(
        *(spans[name] for name in names), window=shape.window, sink_tokens=0
    )
    out, lse = gpu_decode.paged_attention(
        data.q,
        data.pages,
        table,
        layer=layer,
        **spans,
        scale=shape.head_dim**-0.5,
        window=shape.window,
        sink_tokens=0,
        lag=None,
        soft_cap=None,
        out_dtype=jnp.float32,
        interpret=jax.default_backend() != "gpu",
        config=config,
    )
    if data.sink_logits is not None:
        out, _ = add_learned_sink(out, lse, data.sink_logits)
    return out


def default_tiles(sizes: Sizes, data: Data) -> DecodeConfig:
    """The tile sizes that the GPU decode kernel takes by itself."""
    shape = sizes.workload
    rows = shape.q_heads // shape.kv_heads
    return gpu_decode.default_config(data.pages, rows=rows, window=shape.window)


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
