"""Cases of paged attention beside the same keys and values unpaged, and ways to call the op."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backends import interpret_kernels
from pallas_kernels.codecs.codec import Exact, KVCodec, page_mean
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.layouts.plain import Plain
from pallas_kernels.layouts.token_major import TokenMajor
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.triton import call
from pallas_kernels.pages import Pages
from pallas_kernels.rule import CAUSAL, Rule
from pallas_kernels.segment import Part, Queries, Segment

LAYERS, LAYER, SCALE = 3, 1, 0.2
KERNEL_STATIC = ("rule", "soft_cap", "config", "interpret")


def call_op(
    queries: Queries,
    pages: Pages,
    segment: Segment,
    rule: Rule = CAUSAL,
    *,
    interpret=False,
    layer=LAYER,
    scale=SCALE,
    **options,
) -> Part:
    """The op, not jitted."""
    with interpret_kernels() if interpret else contextlib.nullcontext():
        return paged_attention(queries, pages, segment, rule, layer=layer, scale=scale, **options)


# Cases of equal shapes and options share a compiled program, whatever their lengths.
attend_op = jax.jit(
    call_op,
    static_argnames=("rule", "interpret", "layer", "scale", "soft_cap", "out_dtype", "backend"),
)


def call_kernel(queries, pages, segment, rule=CAUSAL, *, config, interpret, soft_cap=None) -> Part:
    """The GPU kernel below the op, not jitted, with tile sizes of the test's choice."""
    return call.paged_attention(
        queries,
        pages,
        segment,
        rule=rule,
        layer=jnp.int32(LAYER),
        scale=SCALE,
        soft_cap=soft_cap,
        out_dtype=jnp.float32,
        interpret=interpret,
        config=config,
    )


attend_kernel = jax.jit(call_kernel, static_argnames=KERNEL_STATIC)
oracle = jax.jit(dense_attention, static_argnames=("scale", "rule", "soft_cap"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op, and the same keys and values without pages."""

    queries: Queries
    pages: Pages
    segment: Segment
    k: jax.Array  # [batch, tokens, kv_heads, head_dim], as the pages hold them, dequantized
    v: jax.Array  # like k

    @property
    def arguments(self):
        return self.queries, self.pages, self.segment

    def attend(self, rule=CAUSAL, *, backend=None, **options) -> Part:
        """Result of the op."""
        with on_the_device() if backend == "gpu" else contextlib.nullcontext():
            return attend_op(*self.arguments, rule, backend=backend, **options)

    def attend_kernel(self, rule=CAUSAL, *, interpret, config=None, **options) -> Part:
        """Result of the GPU kernel; `config=None` lets it choose its tile sizes."""
        with on_the_device():
            return attend_kernel(
                *self.arguments, rule, interpret=interpret, config=config, **options
            )

    def dense(self, rule=CAUSAL, **options):
        """Result of the dense formula."""
        first, stop = (np.asarray(x)[:, None] for x in (self.segment.start, self.segment.stop))
        j = np.arange(self.k.shape[1], dtype=np.int32)[None]
        k_position = np.where((j >= first) & (j < stop), j, -1)
        return oracle(
            self.queries.q,
            self.k,
            self.v,
            self.queries.positions,
            k_position,
            scale=SCALE,
            rule=rule,
            **options,
        )


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
    unread=None,
    poison=np.nan,
):
    """A case whose pages are shuffled, with `poison` wherever there is no token of a segment.

    Queries are float32; their padding rows are NaN.

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
      unread: entry of the table where a segment has no page; None for the null page in every
        other row and a page of poison in the rest.
      poison: in floats; integers get their largest value, or 0 if this is 0.
    """
    rng = np.random.default_rng(0)
    batch, tokens = len(lengths), -(-max(lengths) // page_size) * page_size
    q_lens = (1,) * batch if q_lens is None else q_lens
    kv_start = (0,) * batch if kv_start is None else kv_start
    width = tokens // page_size + 1 if width is None else width
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    k, v = (normal(batch, kv_heads, tokens, head_dim) for _ in range(2))
    layout = _layout(store, head_dim, page_size, word_bits)
    if layout.codec.key_mean == "page":
        k = k + normal(1, kv_heads, 1, head_dim)
    k, v, arrays, mean = jax.tree.map(np.asarray, _store(layout, k, v))
    table, pools, means = _fill_pages(
        layout,
        arrays,
        mean,
        lengths,
        kv_start,
        width=width,
        unread=unread,
        poison=poison,
        rng=rng,
    )
    q = normal(batch, max(1, *q_lens), kv_heads * group, head_dim)
    padding = np.arange(q.shape[1])[None, :, None, None] >= np.reshape(q_lens, (-1, 1, 1, 1))
    i32 = lambda x: jnp.asarray(x, jnp.int32)
    return Case(
        queries=Queries(
            jnp.asarray(np.where(padding, np.float32(np.nan), q)),
            i32(np.subtract(lengths, q_lens)),
            i32(q_lens),
        ),
        pages=Pages(
            arrays=jax.tree.map(jnp.asarray, pools),
            key_mean=None if mean is None else jnp.asarray(means),
            layout=layout,
        ),
        segment=Segment(i32(table), i32(kv_start), i32(lengths)),
        k=jnp.asarray(np.swapaxes(k, 1, 2)),
        v=jnp.asarray(np.swapaxes(v, 1, 2)),
    )


def _fill_pages(layout, arrays, mean, lengths, kv_start, *, width, unread, poison, rng):
    """Cuts sequences' arrays into shuffled pages; returns the table, the pools and the means."""
    page_size, axes, batch = layout.page_size, layout.token_axes, len(lengths)
    kv_heads = layout.kv_heads(arrays)
    pages = 2 + batch * width
    free = list(rng.permutation(np.arange(1, pages - 1)))
    table = np.full((batch, width), pages - 1 if unread is None else unread, np.int32)
    if unread is None:
        table[::2] = 0
    pools = {}
    for name, x in arrays.items():
        shape = list(x.shape[1:])
        shape[axes[name]] = page_size
        pools[name] = np.full((LAYERS, pages, *shape), _poison(x.dtype, poison), x.dtype)
    means = np.full((LAYERS, pages, kv_heads, layout.head_dim), np.nan, np.float16)
    for b, (start, stop) in enumerate(zip(kv_start, lengths, strict=True)):
        for g in range(start // page_size, -(-stop // page_size)):
            page = table[b, g % width] = free.pop()
            if mean is not None:
                means[LAYER, page] = mean[b, :, g]
            low, high = max(start, g * page_size), min(stop, (g + 1) * page_size)
            for name, x in arrays.items():
                source = np.moveaxis(x[b], axes[name], 0)
                target = np.moveaxis(pools[name][LAYER, page], axes[name], 0)
                target[low % page_size : low % page_size + high - low] = source[low:high]
    return table, pools, means


def _layout(store, head_dim, page_size, word_bits):
    """Layout of exact pages for a float type; for a codec, the layout that the GPU kernel reads."""
    if isinstance(store, KVCodec):
        return TokenMajor(codec=store, head_dim=head_dim, page_size=page_size, word_bits=word_bits)
    codec = KVCodec(name="exact", key=Exact(store), value=Exact(store))
    return Plain(codec=codec, head_dim=head_dim, page_size=page_size)


@functools.partial(jax.jit, static_argnames="layout")
def _store(layout, k, v):
    """Returns keys and values dequantized, the arrays that are stored, and key means per page."""
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
