"""The two kinds of page pool that attention reads: values as they are, and codes."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:  # codecs lie above the kernels: only their interface is used here
    from jaxkv.codecs import PageLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactPages:
    """Keys and values in a float type."""

    k: jax.Array  # [layers, pages, kv_heads, page_size, head_dim]
    v: jax.Array  # like k

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by name; raises ValueError where `k` and `v` differ."""
        if self.k.ndim != 5 or self.k.shape != self.v.shape:
            raise ValueError(
                f"k.shape={self.k.shape}, v.shape={self.v.shape} must be equal and "
                "[layers, pages, kv_heads, page_size, head_dim]."
            )
        names = ("layers", "pages", "kv_heads", "page_size", "head_dim")
        return dict(zip(names, self.k.shape, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedPages:
    """Codes and factors, laid out as `layout` says, and key means where the codec removes them.

    A mean is in the space of the codes (rotated, if the key codec rotates): a score is
    `q' . (scale * code_values + mean)` with one rotated query `q'`.
    """

    arrays: dict[str, jax.Array]  # of layout.arrays, each [layers, pages, ...]
    key_mean: jax.Array | None  # f16[layers, pages, kv_heads, head_dim]; 1 page: one for all
    layout: "PageLayout" = dataclasses.field(metadata=dict(static=True))

    def means(self, layer: int | jax.Array, page: jax.Array) -> jax.Array | None:
        """Key means of pages, `f16[*page.shape, kv_heads, head_dim]`."""
        if self.key_mean is None:
            return None
        return self.key_mean[layer, page if self.key_mean.shape[1] > 1 else jnp.zeros_like(page)]

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by name; raises ValueError where an array is not what the layout says."""
        layers, pages = next(iter(self.arrays.values())).shape[:2]
        for name, one in self.layout.arrays.items():
            if self.arrays[name].shape != (layers, pages, *one.shape):
                raise ValueError(
                    f"{name}.shape={self.arrays[name].shape} must be {(layers, pages, *one.shape)}."
                )
        return dict(
            layers=layers,
            pages=pages,
            kv_heads=self.layout.kv_heads,
            page_size=self.layout.page_size,
            head_dim=self.layout.head_dim,
        )


Pages = ExactPages | CodedPages
