"""Tables that map a sequence's logical pages to page ids.

Logical page `g` holds positions from `g * page_size` on. The ids of the first `sink_pages` logical
pages are in the sink table. The id of a later page `g` is in slot `g % width` of a ring, so that a
windowed sequence of any length needs O(window) slots. Entries that hold no page are `NULL_PAGE`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.allocator import NULL_PAGE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageTables:
    """Page ids of every sequence in one store."""

    ring: jax.Array  # i32[batch, width]
    sinks: jax.Array | None  # i32[batch, sink_pages]; None without sink pages

    @property
    def sink_pages(self) -> int:
        """Number of slots of the sink table."""
        return 0 if self.sinks is None else self.sinks.shape[1]


def create_tables(batch: int, *, width: int, sink_pages: int) -> PageTables:
    """Returns tables whose entries are all `NULL_PAGE`."""
    return PageTables(
        ring=jnp.full((batch, width), NULL_PAGE, jnp.int32),
        # No array of size zero: some that save pytrees refuse it.
        sinks=jnp.full((batch, sink_pages), NULL_PAGE, jnp.int32) if sink_pages else None,
    )


def look_up(tables: PageTables, logical: jax.Array) -> jax.Array:
    """Page ids of logical pages `i32[batch, n]`; the caller masks pages that are not in use."""
    ring = jnp.take_along_axis(tables.ring, logical % tables.ring.shape[1], axis=1)
    if tables.sinks is None:
        return ring
    last = tables.sink_pages - 1
    sink = jnp.take_along_axis(tables.sinks, jnp.clip(logical, 0, last), axis=1)
    return jnp.where(logical <= last, sink, ring)


def enter(tables: PageTables, logical: jax.Array, page: jax.Array, where: jax.Array) -> PageTables:
    """Writes `page` as the id of logical page `logical` where `where`; all are `[batch, n]`."""
    batch, width = tables.ring.shape
    sink_pages = tables.sink_pages
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    slot = jnp.where(where & (logical >= sink_pages), logical % width, width)
    ring = tables.ring.at[row, slot].set(page, mode="drop")
    if tables.sinks is None:
        return dataclasses.replace(tables, ring=ring)
    slot = jnp.where(where & (logical < sink_pages), logical, sink_pages)
    return PageTables(ring=ring, sinks=tables.sinks.at[row, slot].set(page, mode="drop"))


def entries(tables: PageTables) -> jax.Array:
    """Every entry of both tables side by side, `i32[batch, width + sink_pages]`."""
    if tables.sinks is None:
        return tables.ring
    return jnp.concatenate([tables.ring, tables.sinks], axis=1)
