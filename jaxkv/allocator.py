"""Hands out and takes back the pages of one pool: a free stack and reference counts, no loops.

Every function takes a batch of requests, is deterministic, and costs O(requests) whatever the
pool's size. It manages page ids only, not the contents of pages.
"""

import dataclasses

import jax
import jax.numpy as jnp

NULL_PAGE = 0  # never handed out; table entries that hold no page have this id


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagePool:
    """Which pages of a pool are free, and how often each of the others is referenced."""

    free_stack: jax.Array  # i32[pages], the first `free_pages` entries are the ids of free pages
    free_pages: jax.Array  # i32[], height of the stack
    references: jax.Array  # i32[pages], number of table entries that name the page; 0 if free


def create_pool(pages: int) -> PagePool:
    """Returns a pool with every page but the null page free, the lowest on top."""
    stack = jnp.arange(pages - 1, -1, -1, dtype=jnp.int32)  # ends with the null page, above height
    return PagePool(
        free_stack=stack,
        free_pages=jnp.int32(pages - 1),
        references=jnp.zeros(pages, jnp.int32),
    )


def allocate(pool: PagePool, wanted: jax.Array) -> tuple[PagePool, jax.Array]:
    """Gives one page to each true entry; the caller must have checked that there are enough.

    Args:
      pool: the pool that the pages come from.
      wanted: `bool[...]`, any shape, at most `pool.free_pages` of them true.

    Returns:
      The new pool, and `i32[...]` page ids, `NULL_PAGE` where nothing was wanted.
    """
    flat = wanted.reshape(-1)
    taken = jnp.cumsum(flat, dtype=jnp.int32)
    place = pool.free_pages - taken
    page = jnp.where(flat, pool.free_stack[jnp.maximum(place, 0)], NULL_PAGE)
    new = dataclasses.replace(
        pool,
        free_pages=pool.free_pages - taken[-1],
        references=pool.references.at[_named(pool, page)].set(1, mode="drop"),
    )
    return new, page.reshape(wanted.shape)


def retain(pool: PagePool, page: jax.Array) -> PagePool:
    """Counts one more reference for every entry of `page`, `i32[...]`; null pages are skipped."""
    references = pool.references.at[_named(pool, page.reshape(-1))].add(1, mode="drop")
    return dataclasses.replace(pool, references=references)


def release(pool: PagePool, page: jax.Array) -> PagePool:
    """Drops one reference for every entry of `page`, `i32[...]`; null pages are skipped.

    A page whose last references go in this call returns to the stack once, however often it is
    named.
    """
    page = page.reshape(-1)
    index = _named(pool, page)
    references = pool.references.at[index].add(-1, mode="drop")
    dying = (page != NULL_PAGE) & (references[page] == 0)
    # Of several entries that name a dying page, the first returns it. Each entry writes a negative
    # number where the count was, smaller for earlier entries; the entry that finds its own number
    # there afterwards was the first.
    rank = -1 - jnp.arange(page.size, 0, -1, dtype=jnp.int32)
    dead = jnp.where(dying, page, references.size)
    claimed = references.at[dead].min(rank, mode="drop")
    returns = dying & (claimed[page] == rank)
    place = pool.free_pages + jnp.cumsum(returns, dtype=jnp.int32) - 1
    place = jnp.where(returns, place, references.size)
    returned = jnp.where(returns, page, references.size)  # with `dead` here, XLA copies the counts
    return PagePool(
        free_stack=pool.free_stack.at[place].set(page, mode="drop"),
        free_pages=pool.free_pages + jnp.sum(returns, dtype=jnp.int32),
        references=claimed.at[returned].set(0, mode="drop"),
    )


def _named(pool: PagePool, page: jax.Array) -> jax.Array:
    """Index for `.at[...]` in mode "drop": null pages get one that is out of range."""
    return jnp.where(page == NULL_PAGE, pool.references.size, page)
