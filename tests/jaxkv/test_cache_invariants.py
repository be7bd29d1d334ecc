"""Random operations on a cache and on sets and lists that stand for it: the contract holds always.

Three groups at once: all tokens, a window that is no multiple of the page, a window with sinks.
Every token has its own number, written as its key, so that reading pages tells whose they are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from jaxkv import CacheConfig, KVCache, LayerSpec

PAGE, BATCH, STEP = 4, 4, 3 * 4  # a step adds up to three pages
MAX_TOKENS = 46  # no multiple of the page
FULL = LayerSpec(kv_heads=1, head_dim=2, dtype="float32")
WINDOWED = dataclasses.replace(FULL, window=7)
WITH_SINKS = dataclasses.replace(FULL, window=10, sink_tokens=5)


def make_config(pages=None, batch=BATCH):
    return CacheConfig(
        layers=(FULL, WINDOWED, WITH_SINKS, FULL),
        batch=batch,
        max_tokens=MAX_TOKENS,
        max_new_tokens=STEP,
        page_size=PAGE,
        pages=pages,
    )


def i32(values):
    return jnp.asarray(values, jnp.int32)


@functools.partial(jax.jit, donate_argnames="cache")
def write(cache, new_tokens, numbers):
    """Prepares and writes `numbers`, `f32[batch, STEP]`, as keys, negated as values."""
    cache = cache.prepare(new_tokens)
    for layer in range(len(cache.config.layers)):
        k = jnp.stack([numbers, jnp.full_like(numbers, layer)], axis=-1)[:, :, None]
        cache, _ = cache.attend(layer, jnp.zeros_like(k), k, -k)
    return cache


commit = jax.jit(KVCache.commit, donate_argnums=0)
free = jax.jit(KVCache.free, donate_argnums=0)
fork = jax.jit(KVCache.fork, donate_argnums=0)

ONES = np.ones((BATCH, STEP), np.float32)


class Page:
    """A page of the model: its identity is the object's, its content a number a slot."""

    def __init__(self):
        self.numbers = np.full(PAGE, np.nan, np.float32)


class Model:
    """What DESIGN section 3 promises, in sets and lists. No rings, no stacks, no counts."""

    def __init__(self, config: CacheConfig):
        self.config, self.specs = config, [group.spec for group in config.groups]
        self.capacity = [group.exact.pages - 1 for group in config.groups]
        self.tables = [[{} for _ in range(config.batch)] for _ in self.specs]  # logical: Page
        self.lengths, self.pending = [0] * config.batch, [0] * config.batch
        self.starved, self.too_long = [False] * config.batch, [False] * config.batch

    def alive(self, spec, length):
        """Logical pages that hold a key which a later token may see, or room for the next."""
        pages = {length // PAGE} if length % PAGE else set()
        sink_pages = {j // PAGE for j in range(spec.sink_tokens)} if spec.window else set()
        for j in range(length):
            sees = spec.window is None or length - j < spec.window or j // PAGE in sink_pages
            pages |= {j // PAGE} if sees else set()
        return pages

    def free_pages(self):
        held = [{id(page) for t in tables for page in t.values()} for tables in self.tables]
        return [room - len(ids) for room, ids in zip(self.capacity, held, strict=True)]

    def prepare(self, new_tokens):
        left, blocked = self.free_pages(), False
        for b, new in enumerate(new_tokens):
            start = self.lengths[b]
            self.too_long[b] = new > STEP or start + new > MAX_TOKENS
            new = 0 if self.too_long[b] else new
            begun = {j // PAGE for j in range(start)}
            needs = {j // PAGE for j in range(start, start + new)} - begun
            blocked |= bool(needs) and min(left) < len(needs)
            self.starved[b] = blocked and bool(needs)
            self.pending[b] = 0 if self.starved[b] else new
            if not self.starved[b]:
                left = [n - len(needs) for n in left]
                for tables in self.tables:
                    tables[b].update({page: Page() for page in needs})

    def write(self, numbers):
        for b, start in enumerate(self.lengths):
            for t in range(self.pending[b]):
                j = start + t
                for tables in self.tables:
                    tables[b][j // PAGE].numbers[j % PAGE] = numbers[b][t]

    def commit(self, accepted):
        for b, wish in enumerate(accepted):
            self.lengths[b] += min(wish, self.pending[b])
            self.pending[b] = 0
            for spec, tables in zip(self.specs, self.tables, strict=True):
                alive = self.alive(spec, self.lengths[b])
                tables[b] = {g: page for g, page in tables[b].items() if g in alive}

    def free(self, mask):
        for b in np.flatnonzero(mask):
            for tables in self.tables:
                tables[b] = {}
            self.lengths[b] = self.pending[b] = 0
            self.starved[b] = self.too_long[b] = False

    def fork(self, src, dst):
        pairs = [(s, d) for s, d in zip(src, dst, strict=True) if s != d]
        sources = [[dict(tables[s]) for tables in self.tables] for s, _ in pairs]
        lengths = [self.lengths[s] for s, _ in pairs]
        unfinished = [n // PAGE if n % PAGE else None for n in lengths]
        self.free([b in [d for _, d in pairs] for b in range(self.config.batch)])
        for (_, d), source, last in zip(pairs, sources, unfinished, strict=True):
            for tables, pages in zip(self.tables, source, strict=True):
                tables[d] = {g: page for g, page in pages.items() if g != last}
        left, blocked, starving = min(self.free_pages()), False, []
        for (_, d), source, last, length in zip(pairs, sources, unfinished, lengths, strict=True):
            copies = last is not None
            blocked |= copies and left == 0
            if blocked and copies:
                starving.append(d)
                continue
            left -= copies
            self.lengths[d] = length
            for tables, pages in zip(self.tables, source, strict=True):
                if copies:
                    tables[d][last] = Page()
                    tables[d][last].numbers = pages[last].numbers.copy()
        self.free([b in starving for b in range(self.config.batch)])
        for d in starving:
            self.starved[d] = True


def check(cache: KVCache, model: Model):
    """Asserts every invariant of DESIGN section 3, and that cache and model say the same."""
    cache = jax.device_get(cache)
    for name in ("lengths", "pending", "starved", "too_long"):
        assert getattr(cache, name).tolist() == getattr(model, name), name
    for group, state, tables in zip(cache.config.groups, cache.groups, model.tables, strict=True):
        check_pool(state.exact)
        check_tables(group, state.exact, tables, model)


def check_pool(store):
    pool, spec = store.pool, store.spec
    named = np.concatenate([store.tables.ring.ravel(), store.tables.sinks.ravel()])
    occurrences = np.bincount(named[named > 0], minlength=spec.pages)
    np.testing.assert_array_equal(pool.references, occurrences)
    free_stack = set(pool.free_stack[: pool.free_pages].tolist())
    referenced = set(np.flatnonzero(occurrences).tolist())
    assert len(free_stack) == pool.free_pages, "a page is free twice"
    assert not free_stack & referenced, "a page is free and referenced"
    assert free_stack | referenced | {0} == set(range(spec.pages)), "a page is lost"
    assert pool.free_pages + len(referenced) + 1 == spec.pages
    assert not store.pages.k[:, 0].any() and not store.pages.v[:, 0].any(), "null page written"


def check_tables(group, store, tables, model):
    spec = store.spec
    physical = {}  # of each model page: shared iff shared there
    for b, pages in enumerate(tables):
        ring, sinks = store.tables.ring[b], store.tables.sinks[b]
        entries = np.concatenate([ring, sinks])
        held = entries[entries != 0].tolist()
        assert len(set(held)) == len(held), "a page stands twice in a sequence's tables"
        assert len(held) == len(pages)
        if spec.window is not None:
            begun = {j // PAGE for j in range(model.lengths[b])}
            stop = model.lengths[b] + model.pending[b]
            in_flight = {j // PAGE for j in range(model.lengths[b], stop)} - begun
            most = -(-(spec.window - 1) // PAGE) + 1 + len(in_flight)
            assert np.count_nonzero(ring) <= most
        for logical, page in pages.items():
            in_sinks = logical < spec.sink_pages
            number = int(sinks[logical] if in_sinks else ring[logical % spec.width])
            assert physical.setdefault(id(page), number) == number != 0
            check_contents(group, store, number, page.numbers)
    assert len(set(physical.values())) == len(physical), "two pages became one"


def check_contents(group, store, number, expected):
    slots = np.flatnonzero(~np.isnan(expected))
    for index, layer in enumerate(group.layers):
        stored = store.pages.k[index, number, 0, slots]
        np.testing.assert_array_equal(stored[:, 0], expected[slots])
        np.testing.assert_array_equal(stored[:, 1], np.float32(layer))
        np.testing.assert_array_equal(store.pages.v[index, number, 0, slots], -stored)


class Pair:
    """A cache and its model, driven by the same operations and compared after each."""

    def __init__(self, config):
        self.cache, self.model, self.next_number = KVCache.create(config), Model(config), 1
        check(self.cache, self.model)

    def write(self, new_tokens):
        shape = (len(new_tokens), STEP)
        numbers = np.arange(self.next_number, self.next_number + np.prod(shape), dtype=np.float32)
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

    def fork(self, src, dst):
        rest = [b for b in range(BATCH) if b not in dst]  # onto themselves: one shape to compile
        self.cache = fork(self.cache, i32([*src, *rest]), i32([*dst, *rest]))
        self.model.fork(src, dst)
        check(self.cache, self.model)


SEQUENCES = st.integers(0, BATCH - 1)
NEW_TOKENS = st.sampled_from([0, 0, 1, 1, *range(2, STEP + 2)])  # three pages; one is too long


def per_sequence(strategy):
    return st.tuples(*[strategy] * BATCH)


class CacheMachine(RuleBasedStateMachine):
    """Hypothesis drives a `Pair`; pools that suffice for all, or that starve some."""

    @initialize(pages=st.sampled_from([None, 7, 14]))
    def create(self, pages):
        self.pair = Pair(make_config(pages))

    @precondition(lambda self: 0 in self.pair.model.lengths)
    @rule(tokens=st.integers(1, STEP), data=st.data())
    def admit(self, tokens, data):
        empty = [b for b, length in enumerate(self.pair.model.lengths) if length == 0]
        b = data.draw(st.sampled_from(empty), "sequence")
        self.pair.append([tokens * (b == other) for other in range(BATCH)])

    @rule(new_tokens=per_sequence(NEW_TOKENS))
    def append(self, new_tokens):
        self.pair.append(new_tokens)

    @rule(new_tokens=per_sequence(NEW_TOKENS), accepted=per_sequence(st.integers(0, STEP)))
    def append_and_roll_back(self, new_tokens, accepted):
        self.pair.append(new_tokens, accepted)

    @rule(steps=st.integers(1, 5))
    def decode(self, steps):
        for _ in range(steps):
            self.pair.append([int(length > 0) for length in self.pair.model.lengths])

    @precondition(lambda self: np.count_nonzero(self.pair.model.lengths) > 1)
    @rule(data=st.data(), order=st.permutations(range(BATCH)))
    def fork_with_few_pages_left(self, data, order):
        greedy, *others = sorted(order, key=lambda b: self.pair.model.lengths[b] == 0)
        one = [int(b == greedy) for b in range(BATCH)]
        self.pair.append(one)
        while not self.pair.model.starved[greedy] and not self.pair.model.too_long[greedy]:
            self.pair.append(one)
        src = data.draw(st.tuples(*[st.sampled_from(others)] * 2), "src")
        self.pair.fork(src, others[-2:])

    @rule(new_tokens=per_sequence(NEW_TOKENS), mask=per_sequence(st.booleans()))
    def free_in_flight(self, new_tokens, mask):
        self.pair.write(new_tokens)
        self.pair.free(mask)
        self.pair.commit(new_tokens)

    @precondition(lambda self: any(self.pair.model.lengths))
    @rule(dst=SEQUENCES, data=st.data())
    def fork_one(self, dst, data):
        live = np.flatnonzero(self.pair.model.lengths).tolist()
        self.pair.fork([data.draw(st.sampled_from(live), "src")], [dst])

    @rule(src=per_sequence(SEQUENCES), dst=st.permutations(range(BATCH)), n=st.integers(2, BATCH))
    def fork_several(self, src, dst, n):
        self.pair.fork(list(src)[:n], list(dst)[:n])

    @rule(ended=SEQUENCES)
    def free_one(self, ended):
        self.pair.free([b == ended for b in range(BATCH)])

    @rule(mask=per_sequence(st.booleans()))
    def free_several(self, mask):
        self.pair.free(mask)


CacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30)
test_random_operations = pytest.mark.slow(CacheMachine.TestCase)


def test_served_in_batch_order_until_one_does_not_fit():
    pair = Pair(make_config(pages=6))
    pair.append([4, 4, 0, 0])
    pair.write([1, 9, 1, 0])  # one page, three where two are left, one
    assert pair.cache.starved.tolist() == [False, True, True, False]
    pair.commit([1, 9, 1, 0])
    pair.append([2, 3, 1, 0])  # no page needed; one, one
    assert pair.cache.lengths.tolist() == [7, 7, 1, 0]


def test_too_long_is_no_starvation_and_stops_nobody():
    pair = Pair(make_config())
    pair.write([STEP + 1, 2, 1, 0])
    assert pair.cache.too_long.tolist() == [True, False, False, False]
    assert pair.cache.pending.tolist() == [0, 2, 1, 0]
    pair.commit([0, 2, 1, 0])
    for _ in range(3):
        pair.append([0, STEP, 0, 0])
    pair.append([0, MAX_TOKENS - 38, 0, 0])
    pair.write([0, 1, 1, 0])
    assert pair.cache.too_long.tolist() == [False, True, False, False]
    pair.commit([0, 1, 1, 0])


def test_less_than_nothing_is_nothing():
    pair = Pair(make_config())
    pair.append([5, 2, 0, 0])
    cache = write(pair.cache, i32([-2, 1, -9, 0]), ONES)
    assert cache.pending.tolist() == [0, 1, 0, 0]
    assert commit(cache, i32([-1, -1, 1, 1])).lengths.tolist() == [5, 2, 0, 0]


def test_forks_diverge_and_never_touch_what_they_share():
    pair = Pair(make_config())
    pair.append([11, 5, 0, 0])
    pair.fork([0, 0], [2, 3])
    used = pair.cache.pages_in_use.tolist()
    assert used[0] == 3 + 2 + 2  # two full pages shared, the third copied twice
    for _ in range(3):
        pair.append([3, 1, 6, 12], [3, 1, 2, 12])


def test_sequences_swap_in_one_call():
    pair = Pair(make_config())
    pair.append([11, 5, 0, 0])
    pair.fork([0, 1], [1, 0])
    assert pair.cache.lengths.tolist() == [5, 11, 0, 0]
    pair.append([9, 9, 1, 1])


def test_fork_without_a_page_for_the_copy_empties_the_target():
    pair = Pair(make_config(pages=6))
    pair.append([9, 4, 0, 0])
    pair.append([0, 1, 0, 0])
    pair.fork([0, 0], [2, 3])
    assert pair.cache.starved.tolist() == [False, False, True, True]
    assert pair.cache.lengths.tolist() == [9, 5, 0, 0]
    pair.fork([0], [1])  # what the target held is released first
    assert pair.cache.starved.tolist() == [False, False, True, True]
    assert pair.cache.lengths.tolist() == [9, 9, 0, 0]


def test_fork_at_a_page_boundary_needs_no_page():
    pair = Pair(make_config(pages=3))
    pair.append([8, 0, 0, 0])
    pair.fork([0, 0, 0], [1, 2, 3])
    assert pair.cache.lengths.tolist() == [8] * 4
    assert pair.cache.groups[0].exact.pool.free_pages == 0
    pair.free([True, True, True, False])
    pair.free([False, False, False, True])
    assert pair.cache.pages_in_use.tolist() == [0, 0, 0]


def test_fork_takes_plain_numbers():
    cache = commit(write(KVCache.create(make_config()), i32([3, 0, 0, 0]), ONES), i32([3, 0, 0, 0]))
    cache = jax.jit(lambda cache: cache.fork(0, 2), donate_argnums=0)(cache)
    assert cache.lengths.tolist() == [3, 0, 3, 0]


def test_counts_for_another_batch_are_refused():
    cache = KVCache.create(make_config())
    for operation in (cache.prepare, cache.commit):
        with pytest.raises(ValueError, match=r".shape=\(1,\): batch must be 4.$"):
            operation(i32([1]))
    with pytest.raises(ValueError, match=r"^mask.shape=\(\) must be \[batch\].$"):
        cache.free(jnp.bool_(True))
