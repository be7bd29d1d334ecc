"""The NVIDIA kernel: one launch for all layers; for each kv head, programs share out the pages.

Programs skip pages that are not wanted. For the others they compute in registers: the rotation (a
dot with its matrix), the code search, factors, the page's mean, and the packed words.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.backends import interpreted
from pallas_kernels.codecs.affine import Int8, MinMax
from pallas_kernels.codecs.codec import KVCodec, TensorCodec
from pallas_kernels.codecs.turboquant import TurboQuant
from pallas_kernels.layouts.token_major import TokenMajor
from pallas_kernels.pages import Pages
from pallas_kernels.shapes import Operand
from pallas_kernels.triton.rotation import sign_matrix, times_signs

WARPS = 8
# Programs to start. Each takes 2 ns even if nothing is wanted, and only a few hundred run at once,
# so more would not be faster. Divided by layers and kv heads it gives the number of lanes, programs
# that share out the list of pages.
PROGRAMS = 2048
PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
# Codecs whose `quantize` is written for this kernel. Another one, a subclass too, may use what
# Triton does not have.
QUANTIZERS = (MinMax, Int8, TurboQuant)
KNOWN = tuple(kind.__name__ for kind in QUANTIZERS)


def refusal(coded: Pages) -> str | None:
    """Why this backend does not serve such pages, in words; None if it does."""
    layout, dims = coded.layout, coded.dims
    if dims["head_dim"] not in HEAD_DIMS:
        return f"head_dim={dims['head_dim']}: the GPU kernel quantizes {HEAD_DIMS}"
    if dims["page_size"] not in PAGE_SIZES:
        return f"page_size={dims['page_size']}: the GPU kernel quantizes {PAGE_SIZES}"
    if not isinstance(layout, TokenMajor):
        return f"{type(layout).__name__}: the GPU kernel writes TokenMajor pages"
    for tensor in (layout.codec.key, layout.codec.value):
        if jnp.issubdtype(tensor.codes_dtype, jnp.floating):
            return f"{layout.codec.name}: the GPU kernel writes integer codes"
        if type(tensor) not in QUANTIZERS:
            return f"{type(tensor).__name__}: the GPU kernel knows {', '.join(KNOWN)}"
    for name, array in coded.arrays.items():
        if not name.startswith("factors") and array.dtype not in (jnp.uint16, jnp.uint32):
            return f"{layout.codec.name}: the GPU kernel writes codes that are packed into words"
        if array.dtype.itemsize == 1 and array.size > 2**31:
            return f"{name}.size={array.size}: over 2 GiB of 1-byte values are not served"
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arrays that the kernel reads; None where the codec needs no such array."""

    layer: Operand  # i32[1], the first layer
    source: Operand  # i32[n], page ids of the exact pool
    target: Operand  # i32[n], page ids of the coded pool
    wanted: Operand  # i32[turns, lanes], entry `turn * lanes + lane` of the list; 0 if not wanted
    k: Operand  # [layers, pages, kv_heads, page_size, head_dim]
    v: Operand  # like k
    k_rotation: Operand | None  # bf16[head_dim, head_dim], +-1
    v_rotation: Operand | None  # like k_rotation
    pre_scales: Operand  # f32[trials], scales that the code search tries
    static_mean: Operand | None  # f16[layers, 1, kv_heads, head_dim]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pools:
    """Arrays that the kernel writes in place."""

    arrays: dict[str, Operand]  # named as in the layout, each [layers, pages, ...]
    page_mean: Operand | None  # f16[layers, pages, kv_heads, head_dim]


def quantize_pages(coded: Pages, exact: Pages, *, layer, source, target, wanted) -> Pages:
    """See `api.quantize_pages`."""
    layout = coded.layout
    assert isinstance(layout, TokenMajor)
    codec = layout.codec
    layers = coded.dims["layers"] if layer is None else 1
    n = source.shape[0]
    lanes = min(n, max(1, PROGRAMS // (layers * coded.dims["kv_heads"])))
    # Entries per lane; Triton loads a column of `wanted`, whose size must be a power of two.
    turns = pl.next_power_of_2(pl.cdiv(n, lanes))
    per_page = codec.key_mean == "page"
    inputs = Inputs(
        layer=jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        source=source,
        target=target,
        wanted=jnp.pad(wanted.astype(jnp.int32), (0, turns * lanes - n)).reshape(turns, lanes),
        k=exact.arrays["k"],
        v=exact.arrays["v"],
        k_rotation=_rotation(codec.key, layout.head_dim),
        v_rotation=_rotation(codec.value, layout.head_dim),
        pre_scales=jnp.asarray(_pre_scales(codec), jnp.float32),
        static_mean=None if per_page else coded.key_mean,
    )
    pools = Pools(arrays=coded.arrays, page_mean=coded.key_mean if per_page else None)
    first, count = len(jax.tree.leaves(inputs)), len(jax.tree.leaves(pools))
    new = pl.pallas_call(
        functools.partial(_kernel, layout=layout),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pools),
        input_output_aliases={first + i: i for i in range(count)},
        grid=(coded.dims["kv_heads"], layers, lanes),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpreted(),
        name="quantize_pages",
    )(inputs, pools)
    key_mean = new.page_mean if per_page else coded.key_mean
    return dataclasses.replace(coded, arrays=new.arrays, key_mean=key_mean)


def _rotation(tensor: TensorCodec, head_dim: int) -> jax.Array | None:
    """A codec's rotation as a matrix of signs; None for a codec that does not rotate."""
    if not tensor.rotated:
        return None
    matrix = sign_matrix(tensor.rotate, head_dim)
    assert matrix is not None, f"{head_dim=} is a power of two"
    return matrix


def _pre_scales(codec: KVCodec) -> tuple[float, ...]:
    """The scales that the search of keys or values tries; both sides try the same ones."""
    sides = (codec.key, codec.value)
    searched = (t.pre_scales for t in sides if isinstance(t, TurboQuant) and t.search)
    return next(searched, (1.0,))


def _kernel(inputs: Inputs, _old: Pools, pools: Pools, *, layout: TokenMajor):
    layer, h = inputs.layer[0] + pl.program_id(1), pl.program_id(0)
    lane, lanes = pl.program_id(2), inputs.wanted.shape[1]

    def visit(turn, _):
        i = turn * lanes + lane
        quantize = lambda: _quantize_page(inputs, pools, layout, layer, h, i)
        pl.when(inputs.wanted[turn, lane] != 0)(quantize)

    # A single load skips lanes that have nothing to do; the loop waits for a load in each turn.
    @pl.when(jnp.max(inputs.wanted[:, lane]) != 0)
    def _():
        jax.lax.fori_loop(0, inputs.wanted.shape[0], visit, None)


def _quantize_page(inputs: Inputs, pools: Pools, layout: TokenMajor, layer, h, i):
    """Quantizes entry `i` of the list, for one layer and kv head."""
    source, target = inputs.source[i], inputs.target[i]
    codec = layout.codec
    k = inputs.k[layer, source, h]  # [page_size, head_dim]
    mean = None
    if codec.key_mean is not None:
        assert inputs.k_rotation is not None
        matrix = inputs.k_rotation[...].astype(jnp.float32) * k.shape[1] ** -0.5
        if pools.page_mean is not None:
            rotated = codec.key_page_mean(
                k, lambda x: jnp.sum(x.astype(jnp.float32)[:, None] * matrix, axis=0)
            )
            pools.page_mean[layer, target, h] = rotated
        else:
            assert inputs.static_mean is not None
            rotated = inputs.static_mean[layer, 0, h]
        mean = jnp.sum(rotated.astype(jnp.float32)[None, :] * matrix, axis=1)[None, :]
    sides = (
        ("k", codec.key, k, mean, inputs.k_rotation),
        ("v", codec.value, inputs.v[layer, source, h], None, inputs.v_rotation),
    )
    factors = []
    for side, tensor, x, own, rotation in sides:
        codes, own_factors = _quantize(tensor, x, own, rotation, inputs.pre_scales)
        factors.append(own_factors)
        shift = 0
        for name in (f"{side}_codes", f"{side}_high"):
            if name not in pools.arrays:
                continue
            words = pools.arrays[name]
            width = words.shape[-1] * words.dtype.itemsize * 8 // codes.shape[-1]
            packed = _pack(codes >> shift, width, words.shape[-1])
            words[layer, target, h] = packed.astype(words.dtype)
            shift += width
    for (name, row), word in layout.factor_words(*factors).items():
        pools.arrays[name][layer, target, row, h] = word


def _quantize(tensor, x, mean, rotation, pre_scales):
    """The codec's `quantize` of `[tokens, head_dim]`: codes as `i32`, not negative, and factors."""
    if rotation is None:
        record = tensor.quantize(x, mean)
        codes = record.codes.astype(jnp.int32)
        signed = tensor.codes_dtype == jnp.int8
        return (codes + 128 if signed else codes), record.factors
    rotate = lambda y: times_signs(y, rotation[...]) * x.shape[1] ** -0.5
    z, length = tensor.normalize(x, mean, rotate)
    codes = _search(tensor, z, pre_scales) if tensor.search else tensor.levels.encode(z)
    return codes.astype(jnp.int32), (tensor.stored_factor(z, codes, length),)


def _search(tensor, z, pre_scales):
    """`TurboQuant.nearest_codes` as a loop over the scales, so registers hold one trial only."""

    def attempt(i, state):
        best, chosen = state
        scale = pre_scales[i]
        own = tensor.cosine(z, z * scale)
        return jnp.maximum(own, best), jnp.where(own > best, scale, chosen)

    none = jnp.full(z.shape[:1], -jnp.inf), jnp.ones(z.shape[:1], jnp.float32)
    _, chosen = jax.lax.fori_loop(0, pre_scales.shape[0], attempt, none)
    return tensor.levels.encode(z * chosen[:, None])


def _pack(codes, width: int, words: int):
    """Packs the low `width` bits of `i32[tokens, head_dim]` in planes: `i32[tokens, words]`."""
    tokens, head_dim = codes.shape
    fields = head_dim // words
    codes = (codes & (2**width - 1)).reshape(tokens, fields, words)
    place = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1) * width
    # Fields do not overlap: a sum is an or.
    return jnp.sum(codes << place, axis=1, dtype=jnp.int32)
