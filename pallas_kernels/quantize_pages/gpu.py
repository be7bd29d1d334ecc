"""The NVIDIA kernel: one launch for all layers, programs for each kv head that share the pages.

They pass over pages that are not wanted. With the others they do in registers what the codecs
define: rotation by a dot with the matrix, code search, factors, the page's mean, packing.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.backends import interpreted
from pallas_kernels.gpu_rotation import sign_matrix, times_signs
from pallas_kernels.pages import CodedPages, ExactPages

if TYPE_CHECKING:
    from jaxkv.codecs import TokenMajor

WARPS = 8
# Programs to start: each takes 2 ns even if nothing is wanted, and a few hundred run at once, so
# more would not be faster. As many lanes as that allows share out the list of pages.
PROGRAMS = 2048
PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)


def refusal(coded: CodedPages, *, platform: str | None = None) -> str | None:
    """Why this backend does not serve such pages, in words; None if it does."""
    platform = platform or jax.default_backend()
    if platform != "gpu" and not interpreted():
        return f"backend='gpu' needs an NVIDIA GPU, and JAX runs on {platform!r}"
    layout, dims = coded.layout, coded.dims
    if dims["head_dim"] not in HEAD_DIMS:
        return f"head_dim={dims['head_dim']}: the GPU kernel quantizes {HEAD_DIMS}"
    if dims["page_size"] not in PAGE_SIZES:
        return f"page_size={dims['page_size']}: the GPU kernel quantizes {PAGE_SIZES}"
    if not hasattr(layout, "factor_words"):  # its class lies above the kernels
        return f"{type(layout).__name__}: the GPU kernel writes TokenMajor pages"
    for tensor in (layout.codec.key, layout.codec.value):
        if jnp.issubdtype(tensor.codes_dtype, jnp.floating):
            return f"{layout.codec.name}: the GPU kernel writes integer codes"
    for name, array in coded.arrays.items():
        if not name.startswith("factors") and array.dtype not in (jnp.uint16, jnp.uint32):
            return f"{layout.codec.name}: the GPU kernel writes codes that are packed into words"
        if array.dtype.itemsize == 1 and array.size > 2**31:
            return f"{name}.size={array.size}: over 2 GiB of 1-byte values are not served"
    return None


def quantize_pages(
    coded: CodedPages, exact: ExactPages, *, layer, source, target, wanted
) -> CodedPages:
    """See `api.quantize_pages`."""
    codec, head_dim = coded.layout.codec, coded.dims["head_dim"]
    layers = coded.dims["layers"] if layer is None else 1
    n = source.shape[0]
    lanes = min(n, max(1, PROGRAMS // (layers * coded.dims["kv_heads"])))
    turns = pl.next_power_of_2(pl.cdiv(n, lanes))  # of a lane; Triton knows no other sizes
    inputs = dict(
        layer=jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        source=source,
        target=target,
        wanted=jnp.pad(wanted.astype(jnp.int32), (0, turns * lanes - n)).reshape(turns, lanes),
        k=exact.k,
        v=exact.v,
    )
    for side, tensor in (("k", codec.key), ("v", codec.value)):
        if tensor.rotated:
            matrix = sign_matrix(tensor.rotate, head_dim)
            assert matrix is not None, f"{head_dim=} is a power of two"
            inputs[f"{side}_rotation"] = matrix
    inputs["pre_scales"] = jnp.asarray(_pre_scales(codec), jnp.float32)
    pools = dict(coded.arrays)
    if coded.key_mean is not None:  # a page's is written, a static one only read
        (pools if codec.key_mean == "page" else inputs)["key_mean"] = coded.key_mean
    names = (*inputs, *(f"old_{name}" for name in pools), *pools)
    out = pl.pallas_call(
        functools.partial(_kernel, names=names, layout=cast("TokenMajor", coded.layout)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools.values()],
        input_output_aliases={len(inputs) + i: i for i in range(len(pools))},
        grid=(coded.dims["kv_heads"], layers, lanes),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpreted(),
        name="quantize_pages",
    )(*inputs.values(), *pools.values())
    new = dict(zip(pools, out, strict=True))
    key_mean = new.pop("key_mean", coded.key_mean)
    return dataclasses.replace(coded, arrays=new, key_mean=key_mean)


def _pre_scales(codec) -> tuple[float, ...]:
    """What either side's search tries; both try the same."""
    return next((t.pre_scales for t in (codec.key, codec.value) if t.rotated and t.search), (1.0,))


def _kernel(*args, names, layout: "TokenMajor"):
    refs = dict(zip(names, args, strict=True))
    layer, h = refs["layer"][0] + pl.program_id(1), pl.program_id(0)
    lane, lanes = pl.program_id(2), refs["wanted"].shape[1]

    def visit(turn, _):
        i = turn * lanes + lane
        pl.when(refs["wanted"][turn, lane] != 0)(lambda: _quantize_page(refs, layout, layer, h, i))

    @pl.when(jnp.max(refs["wanted"][:, lane]) != 0)  # one load; the loop waits for each
    def _():
        jax.lax.fori_loop(0, refs["wanted"].shape[0], visit, None)


def _quantize_page(refs, layout: "TokenMajor", layer, h, i):
    """Entry `i` of the list, for one layer and kv head."""
    source, target = refs["source"][i], refs["target"][i]
    codec = layout.codec
    k = refs["k"][layer, source, h]  # [page_size, head_dim]
    mean = None
    if codec.key_mean is not None:
        matrix = refs["k_rotation"][...].astype(jnp.float32) * k.shape[1] ** -0.5
        if codec.key_mean == "page":
            rotated = codec.key_page_mean(
                k, lambda x: jnp.sum(x.astype(jnp.float32)[:, None] * matrix, axis=0)
            )
            refs["key_mean"][layer, target, h] = rotated
        else:
            rotated = refs["key_mean"][layer, 0, h]
        mean = jnp.sum(rotated.astype(jnp.float32)[None, :] * matrix, axis=1)[None, :]
    factors = []
    for side, tensor, x, own in (
        ("k", codec.key, k, mean),
        ("v", codec.value, refs["v"][layer, source, h], None),
    ):
        rotation = refs.get(f"{side}_rotation")
        codes, own_factors = _quantize(tensor, x, own, rotation, refs["pre_scales"])
        factors.append(own_factors)
        shift = 0
        for name in (f"{side}_codes", f"{side}_high"):
            if name not in refs:
                continue
            words = refs[name]
            width = words.shape[-1] * words.dtype.itemsize * 8 // codes.shape[-1]
            packed = _pack(codes >> shift, width, words.shape[-1])
            words[layer, target, h] = packed.astype(words.dtype)
            shift += width
    for (name, row), word in layout.factor_words(*factors).items():
        refs[name][layer, target, row, h] = word


def _quantize(tensor, x, mean, rotation, pre_scales):
    """The codec's `quantize` of `[tokens, head_dim]`, its codes as `i32` that words can hold."""
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
    """`nearest_codes` with a loop over the scales: one trial at a time in registers."""

    def attempt(i, state):
        best, chosen = state
        scale = pre_scales[i]
        own = tensor.cosine(z, z * scale)
        return jnp.maximum(own, best), jnp.where(own > best, scale, chosen)

    none = jnp.full(z.shape[:1], -jnp.inf), jnp.ones(z.shape[:1], jnp.float32)
    _, chosen = jax.lax.fori_loop(0, pre_scales.shape[0], attempt, none)
    return tensor.levels.encode(z * chosen[:, None])


def _pack(codes, width: int, words: int):
    """The low `width` bits of `i32[tokens, head_dim]` in planes: `i32[tokens, words]`."""
    tokens, head_dim = codes.shape
    fields = head_dim // words
    codes = (codes & (2**width - 1)).reshape(tokens, fields, words)
    place = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1) * width
    # Fields do not overlap: a sum is an or.
    return jnp.sum(codes << place, axis=1, dtype=jnp.int32)
