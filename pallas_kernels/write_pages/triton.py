"""The NVIDIA kernel: writes the new tokens of all sequences in one launch, exact pages only.

A token's heads form one row of `kv_heads * head_dim` numbers, so heads of any number and size fill
whole vectors.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.backends import interpreted
from pallas_kernels.layouts.plain import Plain
from pallas_kernels.pages import Pages

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Tile of keys that one program writes, and of values as well: changes speed, never results."""

    tokens: int
    columns: int  # most columns of a token's row
    warps: int


# Decode and drafts take many short programs of 32 bytes per thread. Chunks of prompts take fewer
# and longer ones, because starting a program costs about as much as a short one's work.
FEW_TOKENS = 1024  # new tokens of all sequences, up to which FEW is used
FEW = WriteConfig(tokens=1, columns=512, warps=1)
MANY = WriteConfig(tokens=8, columns=512, warps=4)


def refusal(pages: Pages) -> str | None:
    """Why this backend does not serve such pages, in words; None if it does.

    Args:
      pages: shapes and dtypes are enough.
    """
    if not isinstance(pages.layout, Plain):
        return f"{pages.layout.codec.name}: the GPU kernel writes exact pages, not codes"
    k, v = pages.arrays["k"], pages.arrays["v"]
    for pool in (k, v):
        if pool.dtype not in DTYPES:
            return f"{pool.dtype} pages: the GPU kernel writes {DTYPES}"
    if k.dtype != v.dtype:
        return f"{k.dtype} keys, {v.dtype} values: the GPU kernel writes one dtype"
    return None


def write_pages(pages: Pages, k, v, *, layer, page, slot, writes) -> Pages:
    """See `api.write_pages`."""
    tokens = writes.size
    pools = (pages.arrays["k"], pages.arrays["v"])
    # As one operand, XLA's rotation fusion also writes the values; as two, they cost a launch each.
    kv = jnp.stack([x.reshape(tokens, -1).astype(pools[0].dtype) for x in (k, v)])
    config = FEW if tokens <= FEW_TOKENS else MANY
    columns = min(config.columns, pl.next_power_of_2(kv.shape[2]))
    inputs = (
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.where(writes, page, pages.dims["pages"]).reshape(-1),
        slot.reshape(-1),
        kv,
    )
    new_k, new_v = pl.pallas_call(
        functools.partial(_kernel, tile=(config.tokens, columns)),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
        input_output_aliases={len(inputs) + i: i for i in range(len(pools))},
        grid=(pl.cdiv(kv.shape[2], columns), pl.cdiv(tokens, config.tokens)),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpreted(),
        name="write_pages",
    )(*inputs, *pools)
    return dataclasses.replace(pages, arrays={"k": new_k, "v": new_v})


def _kernel(
    layer_ref,  # i32[1]
    page_ref,  # i32[tokens]; the number of pages for tokens that are not written
    slot_ref,  # i32[tokens]
    kv_ref,  # [2, tokens, kv_heads * head_dim]
    _old_k_ref,  # same memory as k_pages
    _old_v_ref,  # same memory as v_pages
    k_pages_ref,  # [layers, pages, kv_heads, page_size, head_dim]
    v_pages_ref,  # like k_pages
    *,
    tile: tuple[int, int],
):
    _, tokens, width = kv_ref.shape
    pages, head_dim = k_pages_ref.shape[1], k_pages_ref.shape[4]
    token = pl.program_id(1) * tile[0] + jnp.arange(tile[0], dtype=jnp.int32)
    column = pl.program_id(0) * tile[1] + jnp.arange(tile[1], dtype=jnp.int32)
    # Not `//`: floor division of signed numbers has branches, so Triton would not see that columns
    # are contiguous.
    head, dim = jax.lax.div(column, head_dim), jax.lax.rem(column, head_dim)
    page = plgpu.load(page_ref.at[token], mask=token < tokens, other=pages)
    slot = plgpu.load(slot_ref.at[token], mask=token < tokens, other=0)
    token, page, slot = (jnp.broadcast_to(x[:, None], tile) for x in (token, page, slot))
    column, head, dim = (jnp.broadcast_to(x[None], tile) for x in (column, head, dim))
    inside = (token < tokens) & (column < width)
    # All loads come before the first store, because the compiler cannot move a load over a store.
    layer = layer_ref[0]
    new = [plgpu.load(kv_ref.at[side, token, column], mask=inside) for side in range(2)]
    for x, pool in zip(new, (k_pages_ref, v_pages_ref), strict=True):
        at = pool.at[layer, page, head, slot, dim]
        plgpu.store(at, x.astype(pool.dtype), mask=inside & (page < pages))
