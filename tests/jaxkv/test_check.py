"""`check` passes on every right cache, and names each invariant that is broken on purpose."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import CacheConfig, KVCache, LayerSpec, check
from jaxkv.codecs import KVCodec, MinMax
from tests.helpers import step

PAGE = 4
FULL = LayerSpec(kv_heads=1, head_dim=8, dtype="float32")
CODED = LayerSpec(
    kv_heads=1,
    head_dim=8,
    codec=KVCodec(name="nibbles", key=MinMax(4), value=MinMax(4), recent_pages=1, sink_tokens=2),
    dtype="float32",
)
WINDOWED = dataclasses.replace(FULL, window=6, sink_tokens=3)
CONFIG = CacheConfig(
    layers=(FULL, CODED, WINDOWED), batch=3, max_tokens=40, max_new_tokens=12, page_size=PAGE
)
STORES = ("full", "exact pages beside codes", "codes", "windowed")


def add(cache, counts):
    x = np.random.default_rng(0).standard_normal((3, 3, 12, 1, 8), np.float32)
    options = dict(scale=0.3, soft_cap=None, backend=None)
    counts = jnp.asarray(counts, jnp.int32)
    return step(cache, counts, counts, x, x, x, None, None, **options)[0]


@pytest.fixture(scope="module")
def arrays():
    """A cache with a fork and sequences of 22, 22 and 5 tokens, the last in its second page."""
    cache = add(add(KVCache.create(CONFIG), [12, 0, 5]), [10, 0, 0])
    return jax.device_get(jax.jit(KVCache.fork)(cache, 0, 1))


@pytest.fixture
def cache(arrays):
    return jax.tree.map(jnp.array, arrays)


def change(cache, number, part, **arrays):
    """The cache with other arrays in the pool or the tables of a store."""
    stores = list(cache.stores)
    changed = dataclasses.replace(getattr(stores[number], part), **arrays)
    stores[number] = dataclasses.replace(stores[number], **{part: changed})
    return dataclasses.replace(cache, stores=tuple(stores))


def breaks(cache, message):
    with pytest.raises(ValueError, match=f"^cache is broken: .*{re.escape(message)}.*\\.$"):
        check(cache)


def test_right_caches_pass(cache):
    check(cache)
    check(KVCache.create(CONFIG))
    check(jax.jit(KVCache.prepare)(cache, jnp.int32([12, 1, 0])))


@pytest.mark.parametrize("number", range(len(STORES)), ids=STORES)
def test_broken_pools_are_named(cache, number):
    pool, tables = cache.stores[number].pool, cache.stores[number].tables
    used = int(jax.tree.leaves(tables)[0].max()) or int(jax.tree.leaves(tables)[1].max())
    at = f"stores[{number}]: "
    count = int(pool.references[used])
    wrong = change(cache, number, "pool", references=pool.references.at[used].add(1))
    breaks(
        wrong,
        f"{at}page {used} has a reference count that differs from the page tables "
        f"({count + 1} for {count})",
    )
    free = int(pool.free_pages)
    lost = int(pool.free_stack[free - 1])
    breaks(
        change(cache, number, "pool", free_pages=jnp.int32(free - 1)), f"{at}page {lost} is lost"
    )
    breaks(change(cache, number, "pool", free_pages=jnp.int32(-1)), f"{at}free_pages=-1 must be")
    twice = pool.free_stack.at[0].set(lost)
    breaks(
        change(cache, number, "pool", free_stack=twice),
        f"{at}page {lost} is in the free list twice",
    )
    both = pool.free_stack.at[0].set(used)
    breaks(change(cache, number, "pool", free_stack=both), f"{at}page {used} is free, and page tab")
    null = pool.free_stack.at[0].set(0)
    breaks(change(cache, number, "pool", free_stack=null), f"{at}the null page is in the free list")
    far = pool.free_stack.at[0].set(999)
    breaks(change(cache, number, "pool", free_stack=far), f"{at}the free list has page 999 of")


def move(cache, number, b, old, new):
    """Renames a page of one sequence in its table; counts follow, so that only owners are wrong."""
    store = cache.stores[number]
    rename = lambda t: t.at[b].set(jnp.where(t[b] == old, new, t[b]))
    references = store.pool.references.at[old].add(-1).at[new].add(1)
    tables = jax.tree.map(rename, store.tables)
    cache = change(cache, number, "pool", references=references)
    return change(cache, number, "tables", ring=tables.ring, sinks=tables.sinks)


def test_wrong_owners_are_named(cache):
    ring = cache.stores[0].tables.ring
    first, last = int(ring[2, 0]), int(ring[2, 1])
    breaks(move(cache, 0, 2, last, int(ring[0, 1])), f"page {last} is lost")
    shared = move(cache, 0, 2, last, int(ring[0, 1]))
    stack = shared.stores[0].pool
    stack = dict(
        free_stack=stack.free_stack.at[stack.free_pages].set(last), free_pages=stack.free_pages + 1
    )
    breaks(
        change(shared, 0, "pool", **stack), f"page {int(ring[0, 1])}, which sequence 2 writes to"
    )
    breaks(move(cache, 0, 2, last, first), "sequence 2 holds a page twice")
    elsewhere = ring.at[2].set(
        jnp.where(jnp.arange(ring.shape[1]) == 5, first, ring[2]).at[0].set(0)
    )
    breaks(
        change(cache, 0, "tables", ring=elsewhere),
        f"sequence 2 of 5 tokens holds page {first}, which it",
    )
    breaks(
        change(cache, 0, "tables", ring=elsewhere), "sequence 2 of 5 tokens lacks a page that it"
    )
    other = ring.at[2, 0].set(ring[0, 1]).at[0, 1].set(ring[2, 0]).at[1, 1].set(ring[2, 0])
    counts = cache.stores[0].pool.references
    counts = counts.at[ring[2, 0]].set(2).at[ring[0, 1]].set(1)
    moved = change(change(cache, 0, "tables", ring=other), 0, "pool", references=counts)
    check(moved)  # the same with other page ids
    crossed = ring.at[1, 0].set(ring[1, 1]).at[1, 1].set(ring[1, 0])
    breaks(change(cache, 0, "tables", ring=crossed), "of sequence 0, and page 0 of 1")
    breaks(change(cache, 0, "tables", ring=ring.at[0, 0].set(-3)), "page tables name page -3 of")


def test_wrong_counts_are_named(cache):
    wrong = lambda **arrays: dataclasses.replace(cache, **arrays)
    breaks(wrong(lengths=cache.lengths.at[0].set(-1)), "lengths[0]=-1 must be at least 0")
    breaks(
        wrong(lengths=cache.lengths.at[0].set(41)),
        "lengths[0]=41 must be at least 0 and at most max_tokens=40",
    )
    breaks(
        wrong(lengths=cache.lengths.at[2].set(9)),
        "sequence 2 of 9 tokens lacks a page that it needs",
    )
    breaks(
        wrong(pending=cache.pending.at[1].set(13)),
        "pending[1]=13 must be at least 0 and at most 12",
    )
    breaks(wrong(pending=cache.pending.at[1].set(-1)), "pending[1]=-1 must be")
    breaks(
        wrong(pending=cache.pending.at[1].set(12)),
        "sequence 1 of 22 tokens lacks a page that it needs",
    )
    breaks(wrong(pending=cache.pending.at[1].set(2)), "pending[1]=2, and no step is prepared")
    starved = wrong(pending=cache.pending.at[1].set(1), starved=cache.starved.at[1].set(True))
    breaks(starved, "pending[1]=1 of a sequence that is starved or too long")


def test_wrong_arrays_are_named(cache):
    wrong = lambda **arrays: dataclasses.replace(cache, **arrays)
    breaks(wrong(starved=jnp.zeros(3, jnp.int32)), "starved is int32[3], and must be bool[3]")
    breaks(wrong(lengths=cache.lengths[:2]), "lengths is int32[2], and must be int32[3]")
    breaks(wrong(attended=None), "attended is missing")
    breaks(change(cache, 0, "tables", ring=None), "stores.0.tables.ring is missing")
    for bad in (None, cache.config, (cache,)):
        with pytest.raises(ValueError, match="^cache must be a KVCache, not "):
            check(bad)
    with pytest.raises(ValueError, match="^check runs on the host, outside of jit: "):
        jax.jit(check)(cache)
    cache.lengths.delete()  # as donation to a step does
    with pytest.raises(ValueError, match="^cache was donated to a step: use the cache that the st"):
        check(cache)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tokens_that_are_not_finite_are_named(cache, value):
    page = int(cache.stores[0].tables.ring[2, 1])
    arrays = cache.stores[0].pages.arrays
    bad = {"k": arrays["k"], "v": arrays["v"].at[0, page, 0, 0, 3].set(value)}
    breaks(change(cache, 0, "pages", arrays=bad), "stores[0]: token 4 of sequence 2 is not finite")
    padding = {"k": arrays["k"], "v": arrays["v"].at[0, page, 0, 1, 3].set(value)}
    check(change(cache, 0, "pages", arrays=padding))  # behind the last token


def test_long_lists_of_faults_are_cut(cache):
    config = dataclasses.replace(CONFIG, batch=12)
    cache = KVCache.create(config)
    cache = dataclasses.replace(cache, lengths=cache.lengths - 1)
    with pytest.raises(ValueError, match=r"lengths\[7\]=-1 .*; and [0-9]+ more\.$"):
        check(cache)
