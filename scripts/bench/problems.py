"""A case laid out: lengths, a table of shuffled pages, and how large its pools must be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.codecs import PageLayout, default_layout, get_codec
from scripts.bench.cases import WORKLOADS, Case, Workload
from scripts.shared.options import GIB

EXACT_DTYPE = jnp.dtype("bfloat16")
COLD_BYTES = 400e6  # pools are at least this large: beyond any L2 cache
CHUNK_VALUES = 2**24  # most keys made at once
LOOP_SECONDS = 0.02  # wall time of one loop: long beside its launch


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
    """A case, its sizes, and its lengths and page table on the host."""

    case: Case
    sizes: Sizes
    lengths: np.ndarray  # [batch]
    table: np.ndarray  # [batch, width], a ring
    read_bytes: float  # of the keys and values that a call must read

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
        """Random lengths to check with; the first is at least half of the one that is timed."""
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

    Args:
      case: what is measured.
      page_size: tokens per page.
      max_gib: most memory for the pools.
      platform: "cpu", "gpu" or "tpu", whose layout coded pages have; None for JAX's own.

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
    chunk = chunk_pages(shape, page_size, live)
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
    if case.layers is None and most == 1:  # one layer of tens of GB stays in no cache either
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


def chunk_pages(shape: Workload, page_size: int, pages: int) -> int:
    """Pages per chunk: the fewest with which the number of chunks is least."""
    most = max(1, CHUNK_VALUES // (shape.kv_heads * page_size * shape.head_dim))
    return -(-pages // -(-pages // most))
