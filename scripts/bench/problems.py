"""What a benchmark of decode attention runs on: models' shapes, cases, pages, the right answer.

Keys are normal about a mean of each channel; pages are shuffled; pools are larger than any cache.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.codecs import PageLayout, default_layout, get_codec
from pallas_kernels.backends import Backend
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.pages import CodedPages, ExactPages, Pages
from pallas_kernels.quantize_pages.xla import quantize_page
from scripts.plan import GIB

MAX_ERROR = 3e-3  # relative L2 to the float32 reference on the same stored values
EXACT_DTYPE = jnp.dtype("bfloat16")
COLD_BYTES = 400e6  # a layer is read again after so many bytes: beyond any L2 cache
CHUNK_VALUES = 2**24  # keys made at once
LOOP_SECONDS = 0.02  # wall time of one loop: long beside its launch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One layer's attention of a model."""

    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    learned_sinks: bool = False


WORKLOADS = {
    "llama-3-8b": Workload(q_heads=32, kv_heads=8, head_dim=128),
    "llama-3-70b": Workload(q_heads=64, kv_heads=8, head_dim=128),
    "mistral-7b": Workload(q_heads=32, kv_heads=8, head_dim=128, window=4096),
    "gpt-oss-20b": Workload(q_heads=64, kv_heads=8, head_dim=64, learned_sinks=True),
    "gpt-oss-20b-window": Workload(
        q_heads=64, kv_heads=8, head_dim=64, window=128, learned_sinks=True
    ),
    "gemma-3-12b": Workload(q_heads=16, kv_heads=8, head_dim=256),
    "gemma-3-12b-window": Workload(q_heads=16, kv_heads=8, head_dim=256, window=1024),
    "smollm2": Workload(q_heads=9, kv_heads=3, head_dim=64),
    "tiny": Workload(q_heads=8, kv_heads=2, head_dim=64, window=80, learned_sinks=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: a row of the table."""

    workload: str
    batch: int
    context: int
    codec: str
    ragged: bool = False
    layers: int | None = None  # of the pools; None for as many as it takes

    @property
    def group(self) -> str:
        """Everything but the codec."""
        ragged = " ragged" if self.ragged else ""
        layers = "" if self.layers is None else f" {self.layers} layers"
        return f"{self.workload} b{self.batch} {short(self.context)}{ragged}{layers}"


def short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """All that the shape of a case's arrays and programs depends on."""

    workload: Workload
    batch: int
    width: int  # of the page table
    layers: int
    pages: int
    page_size: int
    layout: PageLayout | None  # None: exact

    @property
    def page_bytes(self) -> int:
        """Stored bytes of a layer's page, all heads, page mean included."""
        shape, layout = self.workload, self.layout
        if layout is None:
            values = 2 * shape.kv_heads * self.page_size * shape.head_dim
            return values * EXACT_DTYPE.itemsize
        return shape.kv_heads * layout.codec.page_bytes(shape.head_dim, self.page_size)

    @property
    def layer_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def steps(self) -> int:
        """Calls of one loop."""
        speed = 3e12 if jax.default_backend() == "gpu" else 3e9
        call = self.layer_bytes / speed + 1e-5
        return int(np.clip(LOOP_SECONDS / call, 4, 512))

    @property
    def checked(self) -> int:
        """Sequences compared with the reference, which holds them in float32."""
        return max(1, min(3, self.batch, 2**17 // (self.width * self.page_size)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A case, its sizes, and its numbers on the host."""

    case: Case
    sizes: Sizes
    lengths: np.ndarray  # [batch]
    table: np.ndarray  # [batch, width], a ring
    read_bytes: float  # that a call must read

    def spans(self, lengths: np.ndarray) -> dict[str, jax.Array]:
        """Positions that the op takes, for sequences of these lengths in the same table."""
        first = _first_page(lengths, self.sizes.workload.window, self.sizes.page_size)
        spans = {
            "q_start": lengths - 1,
            "q_lens": np.ones_like(lengths),
            "kv_start": first * self.sizes.page_size,
            "kv_stop": lengths,
        }
        return {name: jnp.asarray(x, jnp.int32) for name, x in spans.items()}

    def random_lengths(self) -> np.ndarray:
        """Lengths to check with: any, the first at least half of what is timed."""
        rng = np.random.default_rng(1)
        lengths = rng.integers(1, self.lengths + 1)
        lengths[0] = rng.integers(self.lengths[0] // 2 + 1, self.lengths[0] + 1)
        return lengths


def _first_page(lengths: np.ndarray, window: int | None, page_size: int) -> np.ndarray:
    live = lengths if window is None else np.minimum(lengths, window)
    return (lengths - live) // page_size


def make_problem(
    case: Case, *, page_size: int = 64, max_gib: float = 40.0, platform: str | None = None
) -> Problem:
    """Lays a case out: lengths, a table of shuffled pages, pools that do not stay in a cache.

    `platform` is whose layout coded pages have; None for JAX's.

    Raises:
      ValueError: a shape that the codec or its layout can't hold, or too much memory.
    """
    shape = WORKLOADS[case.workload]
    rng = np.random.default_rng(0)
    lengths = np.full(case.batch, case.context)
    if case.ragged:
        low, high = max(1, case.context // 8), max(1, case.context * 11 // 8)
        lengths = rng.integers(low, high + 1, case.batch)
    first = _first_page(lengths, shape.window, page_size)
    counts = -(-lengths // page_size) - first
    width = int(counts.max()) + 1
    live = 1 + int(counts.sum())  # page 0 is the null page
    sequence = np.repeat(np.arange(case.batch), counts)
    ordinal = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.zeros((case.batch, width), np.int32)
    table[sequence, (first[sequence] + ordinal) % width] = rng.permutation(np.arange(1, live))
    chunk = _chunk_pages(shape, page_size, live)
    layout = None
    if case.codec != "exact":
        layout = default_layout(
            get_codec(case.codec),
            platform=platform or jax.default_backend(),
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            page_size=page_size,
        )
    sizes = Sizes(
        workload=shape,
        batch=case.batch,
        width=width,
        layers=1,
        pages=-(-live // chunk) * chunk,
        page_size=page_size,
        layout=layout,
    )
    layers = case.layers or max(2, int(np.ceil(COLD_BYTES / sizes.layer_bytes)))
    if jax.default_backend() == "cpu":
        layers = case.layers or 2
    most = int(max_gib * GIB / sizes.layer_bytes)
    if case.layers is None and most == 1:  # tens of GB: a layer drives itself out of any cache
        layers = 1
    if layers > most:
        need = layers * sizes.layer_bytes / GIB
        raise ValueError(f"the pools need {need:.1f} GiB, --max-gib is {max_gib:g}")
    tokens = lengths if shape.window is None else np.minimum(lengths, shape.window)
    return Problem(
        case=case,
        sizes=dataclasses.replace(sizes, layers=layers),
        lengths=lengths,
        table=table,
        read_bytes=float(tokens.sum()) * sizes.page_bytes / page_size,
    )


def _chunk_pages(shape: Workload, page_size: int, pages: int) -> int:
    """Pages made at once: the fewest that give the least number of chunks."""
    most = max(1, CHUNK_VALUES // (shape.kv_heads * page_size * shape.head_dim))
    return -(-pages // -(-pages // most))


class Data(NamedTuple):
    """What lives on the device."""

    q: jax.Array  # [batch, 1, q_heads, head_dim]
    pages: Pages
    sink_logits: jax.Array | None  # f32[q_heads]


def make_data(sizes: Sizes, key: jax.Array) -> Data:
    """Normal keys, about a mean of each channel, and values, quantized where there is a codec.

    A chunk of pages at a time: the float32 numbers of all would not fit.
    """
    shape, layout = sizes.workload, sizes.layout
    chunk = _chunk_pages(shape, sizes.page_size, sizes.pages)
    q_key, mean_key, sink_key, pages_key = jax.random.split(key, 4)
    channel_mean = jax.random.normal(mean_key, (shape.kv_heads, 1, shape.head_dim))

    def make_chunk(key):
        dims = (chunk, shape.kv_heads, sizes.page_size, shape.head_dim)
        k, v = jax.random.normal(key, (2, *dims))
        k = k + channel_mean[None]
        if layout is None:
            return k.astype(EXACT_DTYPE), v.astype(EXACT_DTYPE)
        mean = layout.codec.key_page_mean(k) if layout.codec.key_mean else None
        return quantize_page(layout, k, v, mean), mean

    chunks = sizes.layers * sizes.pages // chunk
    made = jax.lax.map(make_chunk, jax.random.split(pages_key, chunks))
    made = jax.tree.map(lambda x: x.reshape(sizes.layers, sizes.pages, *x.shape[2:]), made)
    if layout is None:
        pages = ExactPages(k=made[0], v=made[1])
    else:
        pages = CodedPages(arrays=made[0], key_mean=made[1], layout=layout)
    q_dims = (sizes.batch, 1, shape.q_heads, shape.head_dim)
    sinks = jax.random.normal(sink_key, (shape.q_heads,)) if shape.learned_sinks else None
    return Data(jax.random.normal(q_key, q_dims).astype(EXACT_DTYPE), pages, sinks)


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


def expected(sizes: Sizes, data: Data, table, spans, layer) -> jax.Array:
    """The reference's output of the first `sizes.checked` sequences."""
    n = sizes.checked
    spans = {name: x[:n] for name, x in spans.items()}
    return attend(sizes, "reference", data._replace(q=data.q[:n]), table[:n], spans, layer)


def abstract_inputs(sizes: Sizes) -> tuple[Data, Any, dict]:
    """Shapes of data, table and spans."""
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
