"""A model of the cache's contract in sets and lists, and the check that a cache agrees with it.

Every token has its own number, written digit by digit, so that reading pages of any store tells
whose they are: the digits are levels of the codec, which is lossy in name only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import CacheConfig, KVCache, LayerSpec
from jaxkv.codecs import dequantize_original

PAGE, BATCH, STEP = 4, 4, 3 * 4  # a step adds up to three pages
MAX_TOKENS = 46  # no multiple of the page


def i32(values):
    return jnp.asarray(values, jnp.int32)


def digits(numbers, layer):
    """`[..., head_dim]`: five hexadecimal digits between extremes that make the scale 1."""
    numbers = np.asarray(numbers, np.int32)
    parts = [0 * numbers, *(numbers >> 4 * place & 15 for place in range(5)), layer + 0 * numbers]
    return np.stack([*parts, 15 + 0 * numbers], axis=-1).astype(np.float32)


@functools.partial(jax.jit, donate_argnames="cache")
def write_keys(cache, new_tokens, keys):
    """Prepares and writes `keys`, `f32[layers, batch, STEP, 1, head_dim]`, 15 less as values."""
    cache = cache.prepare(new_tokens)
    for layer, k in enumerate(keys):
        cache, _ = cache.attend(layer, jnp.zeros_like(k), k, 15 - k)
    return cache


def write(cache, new_tokens, numbers):
    keys = [digits(numbers, layer)[:, :, None] for layer in range(len(cache.config.layers))]
    return write_keys(cache, new_tokens, np.stack(keys))


commit = jax.jit(KVCache.commit, donate_argnums=0)
free = jax.jit(KVCache.free, donate_argnums=0)
fork = jax.jit(KVCache.fork, donate_argnums=0)


@jax.jit
def read_all(cache):
    """Keys and values of each store's pages, `f32[layers, pages, page_size, head_dim]`."""
    out = []
    for store in cache.stores:
        pages = store.pages
        key, value = pages.layout.unpack(pages.arrays)
        k = dequantize_original(pages.layout.codec.key, key)
        v = dequantize_original(pages.layout.codec.value, value)
        out.append((k[:, :, 0], v[:, :, 0]))
    return out


@dataclasses.dataclass(frozen=True)
class Keeps:
    """What one of a layer's stores is for, in words of single positions."""

    spec: LayerSpec
    coded: bool
    size: int = PAGE

    @functools.cached_property
    def lossy(self):
        codec, window = self.spec.kv_codec, self.spec.window
        return codec.lossy and (window is None or window > codec.recent_pages * self.size)

    @functools.cached_property
    def sink_pages(self):
        """Pages kept exact, and for ever."""
        tokens = self.spec.sink_tokens if self.lossy or self.spec.window else 0
        tokens = max(tokens, self.spec.kv_codec.sink_tokens if self.lossy else 0)
        return {j // self.size for j in range(tokens)}

    @property
    def is_used(self):
        """Whether some sequence has something to keep here."""
        if self.coded:
            return self.lossy
        return not self.lossy or self.spec.kv_codec.recent_pages > 0 or bool(self.sink_pages)


def by_kind(config, group):
    """The store of values as they are (False) and that of codes (True); None where not needed."""
    found = {store.layout.codec.lossy: store for store in config.stores_of(group)}
    assert len(found) == len(group.stores)
    return {coded: found.get(coded) for coded in (False, True)}


@functools.cache
def read_by(keeps, i):
    """Pages with a token that the query at position `i` sees, and reads from this store."""
    spec, pages = keeps.spec, set()
    for j in range(i + 1):
        page = j // keeps.size
        sees = spec.window is None or i - j < spec.window or j < spec.sink_tokens
        behind = i // keeps.size - page
        old = behind >= spec.kv_codec.recent_pages and page not in keeps.sink_pages
        if sees and (keeps.lossy and old) == keeps.coded:
            pages.add(page)
    return frozenset(pages)


@functools.cache
def held(keeps, length, pending=0):
    """Pages that a sequence holds: for the queries of the step, and for the one after it."""
    pages = set() if keeps.coded else keeps.sink_pages
    pages = pages.union(*(read_by(keeps, length + t) for t in range(pending + 1)))
    return frozenset(pages & {j // keeps.size for j in range(length + pending)})


@functools.cache
def final(keeps, length, pending):
    """Those of them that must be complete: codes are written when a query is about to read them."""
    if not keeps.coded:
        return held(keeps, length, pending)
    return frozenset().union(*(read_by(keeps, length + t) for t in range(max(pending, 1))))


class Page:
    """A page of the model: its identity is the object's."""


class Model:
    """The contract of a cache in sets and lists. No rings, no stacks, no counts."""

    def __init__(self, config: CacheConfig):
        self.config, self.stores, self.capacity = config, [], []
        for group in config.groups:
            for coded, store in by_kind(config, group).items():
                keeps = Keeps(group.spec, coded)
                assert keeps.is_used == (store is not None)
                if store is not None:
                    self.stores.append(keeps)
                    self.capacity.append(store.pages - 1)
        self.tables = [[{} for _ in range(config.batch)] for _ in self.stores]  # logical: Page
        self.tokens = [[] for _ in range(config.batch)]  # numbers, those in flight included
        self.lengths, self.pending = [0] * config.batch, [0] * config.batch
        self.starved, self.too_long = [False] * config.batch, [False] * config.batch

    def free_pages(self):
        used = [{id(page) for t in tables for page in t.values()} for tables in self.tables]
        return [room - len(ids) for room, ids in zip(self.capacity, used, strict=True)]

    def prepare(self, new_tokens):
        self.commit([0] * len(self.pending))  # what was prepared and not committed is dropped
        left, blocked = self.free_pages(), False
        for b, new in enumerate(new_tokens):
            start = self.lengths[b]
            self.too_long[b] = new > STEP or start + new > MAX_TOKENS
            new = 0 if self.too_long[b] else new
            needs = [held(keeps, start, new) - held(keeps, start) for keeps in self.stores]
            blocked |= any(n < len(pages) for n, pages in zip(left, needs, strict=True))
            self.starved[b] = blocked and any(needs)
            self.pending[b] = 0 if self.starved[b] else new
            if not self.starved[b]:
                left = [n - len(pages) for n, pages in zip(left, needs, strict=True)]
                for tables, pages in zip(self.tables, needs, strict=True):
                    tables[b].update({page: Page() for page in pages})

    def write(self, numbers):
        for b, pending in enumerate(self.pending):
            self.tokens[b] += list(numbers[b][:pending])

    def commit(self, accepted):
        for b, wish in enumerate(accepted):
            self.lengths[b] += min(wish, self.pending[b])
            self.pending[b] = 0
            del self.tokens[b][self.lengths[b] :]
            for keeps, tables in zip(self.stores, self.tables, strict=True):
                alive = held(keeps, self.lengths[b])
                tables[b] = {g: page for g, page in tables[b].items() if g in alive}

    def free(self, mask):
        for b in np.flatnonzero(mask):
            for tables in self.tables:
                tables[b] = {}
            self.tokens[b] = []
            self.lengths[b] = self.pending[b] = 0
            self.starved[b] = self.too_long[b] = False

    def fork(self, src, dst):
        pairs = [(s, d) for s, d in zip(src, dst, strict=True) if s != d]
        sources = [[dict(tables[s]) for tables in self.tables] for s, _ in pairs]
        tokens = [list(self.tokens[s]) for s, _ in pairs]
        self.free([b in [d for _, d in pairs] for b in range(self.config.batch)])
        copies = []  # of the page that both would write to, where a store has it
        for (_, d), source, numbers in zip(pairs, sources, tokens, strict=True):
            last = len(numbers) // PAGE
            copies.append([len(numbers) % PAGE > 0 and last in pages for pages in source])
            for tables, pages, own in zip(self.tables, source, copies[-1], strict=True):
                tables[d] = {g: page for g, page in pages.items() if not (own and g == last)}
        left, starving = self.free_pages(), []
        for (_, d), numbers, own in zip(pairs, tokens, copies, strict=True):
            left = [n - copy for n, copy in zip(left, own, strict=True)]
            if any(copy and n < 0 for n, copy in zip(left, own, strict=True)):
                starving.append(d)
                continue
            self.lengths[d], self.tokens[d] = len(numbers), numbers
            for tables, copy in zip(self.tables, own, strict=True):
                if copy:
                    tables[d][len(numbers) // PAGE] = Page()
        self.free([b in starving for b in range(self.config.batch)])
        for d in starving:
            self.starved[d] = True


def check(cache: KVCache, model: Model):
    """Asserts every invariant of pools and tables, and that cache and model say the same."""
    cache, contents = jax.device_get((cache, read_all(cache)))
    for name in ("lengths", "pending", "starved", "too_long"):
        assert getattr(cache, name).tolist() == getattr(model, name), name
    assert cache.config.pages is not None or not any(model.starved), "a full reserve ran out"
    rest = zip(model.stores, model.tables, contents, strict=True)
    for group in cache.config.groups:
        for store in (cache.stores[number] for number in group.stores):
            keeps, tables, values = next(rest)
            check_pool(store)
            check_tables(keeps, store, tables, model)
            check_contents(group, keeps, store, tables, values, model)


def check_pool(store):
    pool, spec = store.pool, store.spec
    named = np.concatenate([table.ravel() for table in jax.tree.leaves(store.tables)])
    occurrences = np.bincount(named[named > 0], minlength=spec.pages)
    np.testing.assert_array_equal(pool.references, occurrences)
    free_stack = set(pool.free_stack[: pool.free_pages].tolist())
    referenced = set(np.flatnonzero(occurrences).tolist())
    assert len(free_stack) == pool.free_pages, "a page is free twice"
    assert not free_stack & referenced, "a page is free and referenced"
    assert free_stack | referenced | {0} == set(range(spec.pages)), "a page is lost"
    assert pool.free_pages + len(referenced) + 1 == spec.pages
    assert not any(x[:, 0].any() for x in jax.tree.leaves(store.pages)), "null page written"


def number_of(store, b, logical):
    """Id of a page, which stands in one of two tables."""
    ring, pinned = store.tables.ring[b], store.tables.sink_pages
    if logical < pinned:
        return int(store.tables.sinks[b, logical])
    return int(ring[logical % len(ring)])


def check_tables(keeps, store, tables, model):
    spec = keeps.spec
    physical = {}  # of each model page: shared iff shared there
    rows = np.concatenate(jax.tree.leaves(store.tables), axis=1)
    for b, pages in enumerate(tables):
        held = rows[b]
        named = held[held != 0].tolist()
        assert len(set(named)) == len(named), "a page stands twice in a sequence's tables"
        assert len(named) == len(pages)
        begun = {j // PAGE for j in range(model.lengths[b])}
        stop = model.lengths[b] + model.pending[b]
        most = len({j // PAGE for j in range(model.lengths[b], stop)} - begun)
        if keeps.lossy and not keeps.coded:
            assert np.count_nonzero(store.tables.ring[b]) <= most + spec.kv_codec.recent_pages
        elif spec.window is not None:
            most += -(-(spec.window - 1) // PAGE) + 1
            assert np.count_nonzero(store.tables.ring[b]) <= most
        for logical, page in pages.items():
            number = number_of(store, b, logical)
            assert physical.setdefault(id(page), number) == number != 0
    assert len(set(physical.values())) == len(physical), "two pages became one"


def check_contents(group, keeps, store, tables, values, model):
    keys, negatives = values
    for b, pages in enumerate(tables):
        complete = final(keeps, model.lengths[b], model.pending[b])
        places = [
            (number_of(store, b, j // PAGE), j % PAGE, number)
            for j, number in enumerate(model.tokens[b])
            if j // PAGE in pages and j // PAGE in complete
        ]
        if places:
            page, slot, numbers = map(np.asarray, zip(*places, strict=True))
            for index, layer in enumerate(group.layers):
                expected = digits(numbers, layer)
                np.testing.assert_array_equal(keys[index, page, slot], expected)
                np.testing.assert_array_equal(negatives[index, page, slot], 15 - expected)


class Pair:
    """A cache and its model, driven by the same operations and compared after each."""

    def __init__(self, config):
        self.cache, self.model, self.next_number = KVCache.create(config), Model(config), 1
        check(self.cache, self.model)

    def write(self, new_tokens):
        shape = (len(new_tokens), STEP)
        numbers = np.arange(self.next_number, self.next_number + np.prod(shape))
        self.next_number += numbers.size
        numbers = numbers.reshape(shape)
        self.cache = write(self.cache, i32(new_tokens), numbers)
        self.model.prepare(new_tokens)
        self.model.write(numbers)
        check(self.cache, self.model)

    def commit(self, accepted):
        self.cache = commit(self.cache, i32(accepted))
        self.model.commit(accepted)
        check(self.cache, self.model)

    def append(self, new_tokens, accepted=None):
        self.write(new_tokens)
        self.commit(new_tokens if accepted is None else accepted)

    def free(self, mask):
        self.cache = free(self.cache, jnp.asarray(mask))
        self.model.free(mask)
        check(self.cache, self.model)
        jaxkv.check(self.cache)

    def fork(self, src, dst):
        rest = [b for b in range(BATCH) if b not in dst]  # onto themselves: one shape to compile
        self.cache = fork(self.cache, i32([*src, *rest]), i32([*dst, *rest]))
        self.model.fork(src, dst)
        check(self.cache, self.model)
        jaxkv.check(self.cache)
