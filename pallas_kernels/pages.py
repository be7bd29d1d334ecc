"""A pool of pages: named arrays, of exact values or of codes, and the layout that explains them."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.codecs.codec import Exact, KVCodec
from pallas_kernels.layouts.page_layout import PageLayout
from pallas_kernels.layouts.plain import Plain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages:
    """Keys and values of all pages of a pool, as `layout` stores them.

    If the codec removes a key mean, the mean is kept in the space of the codes (rotated, if the
    key codec rotates): a score is `q' . (scale * code_values + mean)` with one rotated query `q'`.
    """

    arrays: dict[str, jax.Array]  # named as in layout.arrays, each [layers, pages, ...]
    # f16[layers, pages, kv_heads, head_dim]; a pages axis of size 1 is one mean for all pages.
    key_mean: jax.Array | None
    layout: PageLayout = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def exact(cls, k: jax.Array, v: jax.Array) -> "Pages":
        """Builds pages that hold values unquantized.

        Args:
          k: `[layers, pages, kv_heads, page_size, head_dim]`.
          v: like `k`.

        Raises:
          ValueError: `k` and `v` differ in shape.
        """
        if k.ndim != 5 or k.shape != v.shape:
            raise ValueError(
                f"k.shape={k.shape}, v.shape={v.shape} must be equal and "
                "[layers, pages, kv_heads, page_size, head_dim]."
            )
        *_, page_size, head_dim = k.shape
        codec = KVCodec(name="exact", key=Exact(str(k.dtype)), value=Exact(str(v.dtype)))
        layout = Plain(codec=codec, head_dim=head_dim, page_size=page_size)
        return cls(arrays={"k": k, "v": v}, key_mean=None, layout=layout)

    @property
    def coded(self) -> bool:
        """Whether pages hold codes instead of the values themselves."""
        return self.layout.codec.lossy

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by name; raises ValueError if an array's shape or dtype is not the layout's."""
        layers, pages = next(iter(self.arrays.values())).shape[:2]
        kv_heads = self.layout.kv_heads(self.arrays)
        for name, one in self.layout.arrays(kv_heads).items():
            if self.arrays[name].shape != (layers, pages, *one.shape):
                raise ValueError(
                    f"{name}.shape={self.arrays[name].shape} must be {(layers, pages, *one.shape)}."
                )
            if self.arrays[name].dtype != one.dtype:
                raise ValueError(f"{name}.dtype={self.arrays[name].dtype} must be {one.dtype}.")
        return dict(
            layers=layers,
            pages=pages,
            kv_heads=kv_heads,
            page_size=self.layout.page_size,
            head_dim=self.layout.head_dim,
        )

    def means(self, layer: int | jax.Array, page: jax.Array) -> jax.Array | None:
        """Key means of pages `page`, `f16[*page.shape, kv_heads, head_dim]`; None without means."""
        if self.key_mean is None:
            return None
        return self.key_mean[layer, page if self.key_mean.shape[1] > 1 else jnp.zeros_like(page)]


def empty_pages(
    layout: PageLayout,
    *,
    layers: int,
    pages: int,
    kv_heads: int,
    static_mean: jax.Array | None = None,
) -> Pages:
    """Allocates pages of zeros.

    Args:
      layout: how each page is stored.
      layers: number of layers that share the pool's page ids.
      pages: number of pages of each layer.
      kv_heads: number of key/value heads of each layer.
      static_mean: `f16[layers, 1, kv_heads, head_dim]`, for a codec with `key_mean="static"`.
    """
    arrays = {
        name: jnp.zeros((layers, pages, *one.shape), one.dtype)
        for name, one in layout.arrays(kv_heads).items()
    }
    key_mean = static_mean
    if layout.codec.key_mean == "page":
        key_mean = jnp.zeros((layers, pages, kv_heads, layout.head_dim), jnp.float16)
    return Pages(arrays=arrays, key_mean=key_mean, layout=layout)
