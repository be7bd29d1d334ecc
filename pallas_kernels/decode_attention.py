"""One new token per sequence over head-major pools, as JAX's own example ops lay them out.

For code that calls `jax.experimental.pallas.ops.{gpu,tpu}.paged_attention`. Everything else this
library does is `paged_attention`, on pools whose pages come before heads.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.backends import Backend
from pallas_kernels.checks import check_filled, check_floats, int32s
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.pages import Pages
from pallas_kernels.rule import Rule
from pallas_kernels.segment import Queries, Segment
from pallas_kernels.shapes import bind_dims


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    backend: Backend | None = None,
) -> jax.Array:
    """Attends each sequence's newest token to all its tokens, the newest one included.

    Query head `h` reads kv head `h // (q_heads / kv_heads)`. No pool is copied. JAX's own ops scale
    no scores: pass `scale=1.0` where `q` has been scaled. The one for TPUs takes lengths first.

    Args:
      q: `[batch, q_heads, head_dim]`, any float dtype.
      k_pages: `[kv_heads, pages, page_size, head_dim]`, float16, bfloat16 or float32; `kv_heads`
        divides `q_heads`.
      v_pages: like `k_pages`.
      page_table: `i32[batch, pages_per_seq]`; token `j` is in page `page_table[:, j // page_size]`.
        Entries behind a sequence's last page are not read.
      lengths: `i32[batch]`, tokens, at most `pages_per_seq * page_size`; 0 gives an output of 0.
      scale: factor of scores, positive; usually `head_dim ** -0.5`.
      window: tokens that the newest one sees, itself included; None for all.
      soft_cap: bound on scores, `soft_cap * tanh(s / soft_cap)`; None for none.
      backend: as in `paged_attention`.

    Returns:
      Shaped and typed like `q`.

    Raises:
      ValueError: an argument of a wrong type, kind of numbers, shape or range.
      NotImplementedError: the named backend does not serve this call.
    """
    sizes = bind_dims(
        q=(q, "batch q_heads head_dim"),
        k_pages=(k_pages, "kv_heads pages page_size head_dim"),
        v_pages=(v_pages, "kv_heads pages page_size head_dim"),
        page_table=(page_table, "batch pages_per_seq"),
        lengths=(lengths, "batch"),
    )
    check_filled(sizes)
    check_floats(q=q)
    page_table, lengths = int32s(page_table=page_table, lengths=lengths)
    batch, q_heads, head_dim = q.shape
    kv_heads, pages = sizes["kv_heads"], sizes["pages"]
    if q_heads % kv_heads:
        raise ValueError(f"{q_heads=} must be a multiple of {kv_heads=}.")
    # A sequence per kv head, and the pools as one pool of pages of one head: nothing moves.
    one_head = lambda x: x.reshape(1, kv_heads * pages, 1, *x.shape[2:])
    spread = lambda x: jnp.repeat(x, kv_heads, axis=0)
    head = jnp.tile(jnp.arange(kv_heads, dtype=jnp.int32), batch)
    length = spread(lengths)
    queries = Queries(
        q.reshape(batch * kv_heads, 1, q_heads // kv_heads, head_dim),
        length - 1,
        jnp.minimum(length, 1),
    )
    table = spread(page_table) + pages * head[:, None]
    part = paged_attention(
        queries,
        Pages.exact(one_head(k_pages), one_head(v_pages)),
        Segment(table, jnp.zeros_like(length), length),
        Rule(window=window),
        layer=0,
        scale=scale,
        soft_cap=soft_cap,
        out_dtype=q.dtype,
        backend=backend,
    )
    return part.out.reshape(q.shape)
