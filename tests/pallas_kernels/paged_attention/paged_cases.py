"""Cases of paged attention beside the same keys and values unpaged, and ways to call the op."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backends import interpret_kernels
from pallas_kernels.codecs.codec import KVCodec, page_mean
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.layouts.token_major import TokenMajor
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.triton import call
from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Queries, Segment, add_learned_sink

LAYERS, LAYER, SCALE = 3, 1, 0.2
RULE = ("window", "sink_tokens", "lag", "soft_cap")
# Interpreted kernels are large programs that run once, and jaxlib 0.10 compiles them in a third of
# the time with its older emitter. Later versions have one emitter and refuse the option.
IS_0_10 = jax.lib.__version__.startswith("0.10.")
FAST_COMPILE = {"xla_cpu_use_fusion_emitters": False} if IS_0_10 else {}
KERNEL_STATIC = ("config", "interpret", *RULE)


def call_op(
    q,
    pages,
    table,
    where,
    sink_table=None,
    *,
    interpret=False,
    layer=LAYER,
    scale=SCALE,
    window=None,
    sink_tokens=0,
    lag=None,
    sink_logits=None,
    **options,
):
    """The op, not jitted: `where` holds q_start, q_lens, kv_start and kv_stop."""
    queries, segment = operands(q, table, where, sink_table)
    rule = Rule(window=window, sink_tokens=sink_tokens, lag=lag)
    with interpret_kernels() if interpret else contextlib.nullcontext():
        part = paged_attention(queries, pages, segment, rule, layer=layer, scale=scale, **options)
    return part if sink_logits is None else add_learned_sink(part, sink_logits)


def operands(q, table, where, sink_table=None):
    """Builds the op's queries and segment from arrays."""
    queries = Queries(q, where["q_start"], where["q_lens"])
    return queries, Segment(table, where["kv_start"], where["kv_stop"], sink_table)


# One program for all cases that are alike in shapes and options, whatever their lengths.
attend_op = jax.jit(
    call_op,
    static_argnames=("interpret", "layer", "scale", *RULE, "out_dtype", "backend"),
    compiler_options=FAST_COMPILE,
)


def call_kernel(
    q,
    pages,
    table,
    where,
    *,
    config,
    interpret,
    window=None,
    sink_tokens=0,
    lag=None,
    soft_cap=None,
):
    """The GPU kernel below the op, not jitted, with tile sizes of the test's choice."""
    queries, segment = operands(q, table, where)
    return call.paged_attention(
        queries,
        pages,
        segment,
        rule=Rule(window=window, sink_tokens=sink_tokens, lag=lag),
        layer=jnp.int32(LAYER),
        scale=SCALE,
        soft_cap=soft_cap,
        out_dtype=jnp.float32,
        interpret=interpret,
        config=config,
    )


def dense(q, k, v, q_position, k_position, *, window=None, sink_tokens=0, lag=None, **options):
    """The formula on contiguous keys."""
    rule = Rule(window=window, sink_tokens=sink_tokens, lag=lag)
    return dense_attention(q, k, v, q_position, k_position, rule=rule, **options)


attend_kernel = jax.jit(call_kernel, static_argnames=KERNEL_STATIC, compiler_options=FAST_COMPILE)
oracle = jax.jit(dense, static_argnames=("scale", *RULE))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op, and the same keys and values without pages."""

    q: jax.Array
    pages: Pages
    table: jax.Array
    where: dict[str, jax.Array]  # q_start, q_lens, kv_start, kv_stop
    k: jax.Array  # [batch, tokens, kv_heads, head_dim], as the pages hold them, dequantized
    v: jax.Array  # like k
    page_size: int

    @property
    def arguments(self):
        return self.q, self.pages, self.table, self.where

    def attend(self, *, backend=None, **options):
        """Result of the op."""
        with on_the_device() if backend == "gpu" else contextlib.nullcontext():
            return attend_op(*self.arguments, backend=backend, **options)

    def attend_kernel(self, *, interpret, config=None, **options):
        """Result of the GPU kernel; `config=None` lets it choose its tile sizes."""
        with on_the_device():
            return attend_kernel(*self.arguments, interpret=interpret, config=config, **options)

    def dense(self, **options):
        """Result of the dense formula."""
        start, count, first, stop = (
            np.asarray(self.where[name])[:, None]
            for name in ("q_start", "q_lens", "kv_start", "kv_stop")
        )
        row = np.arange(self.q.shape[1], dtype=np.int32)[None]
        j = np.arange(self.k.shape[1], dtype=np.int32)[None]
        q_position = np.where(row < count, start + row, -1)
        k_position = np.where((j >= first) & (j < stop), j, -1)
        return oracle(self.q, self.k, self.v, q_position, k_position, scale=SCALE, **options)


def on_the_device():
    """Where compiled kernels run: the GPU, if there is one."""
    return jax.default_device(jax.local_devices()[0])


def make_case(
    store,
    *,
    lengths,
    q_lens=None,
    kv_start=None,
    page_size,
    kv_heads=2,
    group=3,
    head_dim,
    word_bits=16,
    width=None,
    q_dtype="float32",
    unread=None,
    poison=np.nan,
    seed=0,
):
    """A case whose pages are shuffled, with `poison` wherever there is no token of a segment.

    Args:
      store: a float dtype, or a `KVCodec`, whose pages are laid out as `TokenMajor`.
      lengths: `kv_stop` of each sequence; its queries are the newest tokens.
      q_lens: query tokens of each; None for one.
      kv_start: first position of each segment; None for 0.
      page_size: tokens per page.
      kv_heads: heads of keys and values.
      group: query heads per kv head.
      head_dim: of keys, values and queries.
      word_bits: of the words that hold codes.
      width: slots of the page table, a ring; None for one more than the longest segment needs.
      q_dtype: of the queries; padding rows are NaN.
      unread: entry of the table where a segment has no page; None for the null page in every
        other row and a page of poison in the rest.
      poison: in floats; integers get their largest value, or 0 if this is 0.
      seed: of all random numbers.
    """
    rng = np.random.default_rng(seed)
    batch, tokens = len(lengths), -(-max(lengths) // page_size) * page_size
    q_lens = (1,) * batch if q_lens is None else q_lens
    kv_start = (0,) * batch if kv_start is None else kv_start
    width = tokens // page_size + 1 if width is None else width
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    k, v = (normal(batch, kv_heads, tokens, head_dim) for _ in range(2))
    k, v, stored = (_encode if isinstance(store, KVCodec) else _round)(
        store, k, v, normal, page_size=page_size, word_bits=word_bits
    )
    pages = 2 + batch * width
    free = list(rng.permutation(np.arange(1, pages - 1)))
    table = np.full((batch, width), pages - 1 if unread is None else unread, np.int32)
    if unread is None:
        table[::2] = 0
    pools = {}
    for name, x in stored.arrays.items():
        shape = list(x.shape[1:])
        shape[stored.axes[name]] = page_size
        pools[name] = np.full((LAYERS, pages, *shape), _poison(x.dtype, poison), x.dtype)
    means = np.full((LAYERS, pages, kv_heads, head_dim), np.nan, np.float16)
    for b, (start, stop) in enumerate(zip(kv_start, lengths, strict=True)):
        for g in range(start // page_size, -(-stop // page_size)):
            page = table[b, g % width] = free.pop()
            if stored.mean is not None:
                means[LAYER, page] = stored.mean[b, :, g]
            low, high = max(start, g * page_size), min(stop, (g + 1) * page_size)
            for name, x in stored.arrays.items():
                source = np.moveaxis(x[b], stored.axes[name], 0)
                target = np.moveaxis(pools[name][LAYER, page], stored.axes[name], 0)
                target[low % page_size : low % page_size + high - low] = source[low:high]
    where = dict(
        q_start=np.subtract(lengths, q_lens), q_lens=q_lens, kv_start=kv_start, kv_stop=lengths
    )
    q = normal(batch, max(1, *q_lens), kv_heads * group, head_dim)
    padding = np.arange(q.shape[1])[None, :, None, None] >= np.reshape(q_lens, (-1, 1, 1, 1))
    return Case(
        q=jnp.asarray(np.where(padding, np.float32(np.nan), q), q_dtype),
        pages=stored.as_pages({n: jnp.asarray(x) for n, x in pools.items()}, jnp.asarray(means)),
        table=jnp.asarray(table),
        where={name: jnp.asarray(x, jnp.int32) for name, x in where.items()},
        k=jnp.asarray(np.swapaxes(k, 1, 2)),
        v=jnp.asarray(np.swapaxes(v, 1, 2)),
        page_size=page_size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """Sequences' arrays before they are cut into pages."""

    arrays: dict[str, np.ndarray]  # [batch, ...], tokens on `axes`
    axes: dict[str, int]
    mean: np.ndarray | None = None  # [batch, kv_heads, pages, head_dim]
    layout: TokenMajor | None = None  # None for exact pages

    def as_pages(self, pools, means) -> Pages:
        if self.layout is None:
            return Pages.exact(**pools)
        key_mean = None if self.mean is None else means
        return Pages(arrays=pools, key_mean=key_mean, layout=self.layout)


def _round(dtype, k, v, *_, **__):
    """Rounds keys and values to a float type; returns them and the arrays that are stored."""
    arrays = {name: np.asarray(jnp.asarray(x, dtype)) for name, x in (("k", k), ("v", v))}
    stored = _Stored(arrays=arrays, axes={"k": -2, "v": -2})
    return *(x.astype(np.float32) for x in arrays.values()), stored


def _encode(codec, k, v, normal, *, page_size, word_bits):
    """Quantizes keys and values; returns them dequantized, and the arrays that are stored."""
    batch, kv_heads, _, head_dim = k.shape
    layout = TokenMajor(
        codec=codec,
        head_dim=head_dim,
        page_size=page_size,
        word_bits=word_bits,
    )
    if codec.key_mean == "page":
        k = k + normal(1, kv_heads, 1, head_dim)
    k, v, arrays, mean = _code(layout, k, v)
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    mean = None if mean is None else np.asarray(mean)
    stored = _Stored(arrays=arrays, axes=layout.token_axes, mean=mean, layout=layout)
    return np.asarray(k), np.asarray(v), stored


@functools.partial(jax.jit, static_argnames="layout")
def _code(layout, k, v):
    codec, mean, k_mean = layout.codec, None, None
    if codec.key_mean == "page":
        paged = k.reshape(*k.shape[:2], -1, layout.page_size, layout.head_dim)
        mean = page_mean(codec.key.rotate(paged), -2)
        k_mean = codec.key.unrotate(mean.astype(jnp.float32))
        k_mean = jnp.repeat(k_mean, layout.page_size, axis=2)
    keys, values = codec.key.quantize(k, k_mean), codec.value.quantize(v)
    k = codec.key.unrotate(codec.key.dequantize(keys))
    v = codec.value.unrotate(codec.value.dequantize(values))
    return k if k_mean is None else k + k_mean, v, layout.pack(keys, values), mean


def _poison(dtype, value):
    if jnp.issubdtype(dtype, jnp.floating):
        return value
    return 0 if value == 0 else np.iinfo(dtype).max
