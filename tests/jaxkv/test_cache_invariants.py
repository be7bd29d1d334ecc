"""Random operations on a cache and on sets and lists that stand for it: the contract holds always.

Layers of every kind side by side: all tokens, windows that are no multiple of the page, sinks,
codecs with none to three recent pages and with sinks of their own. Every token has its own number,
written digit by digit, so that reading pages of any store tells whose they are: the digits are
levels of the codec, which is lossy in name only.
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
from jaxkv.codecs import KVCodec, dequantize_original
from pallas_kernels.codecs.affine import MinMax
from pallas_kernels.pages import ExactPages

PAGE, BATCH, STEP = 4, 4, 3 * 4  # a step adds up to three pages
MAX_TOKENS = 46  # no multiple of the page
FULL = LayerSpec(kv_heads=1, head_dim=8, dtype="float32")
WINDOWED = dataclasses.replace(FULL, window=7)
WITH_SINKS = dataclasses.replace(FULL, window=10, sink_tokens=5)
EXACT_LAYERS = (FULL, WINDOWED, WITH_SINKS, FULL)


def lossy(recent_pages, codec_sinks=0, **options):
    """A layer of nibbles, which keep the numbers below as they are."""
    nibble = MinMax(4)
    codec = KVCodec(
        name="nibbles",
        key=nibble,
        value=nibble,
        recent_pages=recent_pages,
        sink_tokens=codec_sinks,
    )
    return dataclasses.replace(FULL, codec=codec, **options)


MIXED_LAYERS = (
    lossy(2),
    lossy(0, window=7, sink_tokens=5),  # recent tokens are codes, sinks are not
    WINDOWED,
    lossy(1, window=5),  # barely larger than the recent pages
    lossy(2, window=7),  # not larger: exact, and in the other's group
    lossy(3, codec_sinks=3),
)
OTHER_LAYERS = (
    lossy(0),  # nothing is exact
    lossy(1, codec_sinks=5),
    lossy(2, codec_sinks=3, window=10, sink_tokens=6),
    lossy(3, codec_sinks=6, window=14),  # sinks stay exact, and leave the window
    lossy(1, codec_sinks=5),
)


def make_config(pages=None, batch=BATCH, layers=EXACT_LAYERS):
    return CacheConfig(
        layers=layers,
        batch=batch,
        max_tokens=MAX_TOKENS,
        max_new_tokens=STEP,
        page_size=PAGE,
        pages=pages,
    )


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

ONES = np.ones((BATCH, STEP), np.int32)


@jax.jit
def read_all(cache):
    """Keys and values of each store's pages, `f32[layers, pages, page_size, head_dim]`."""
    out = []
    for store in (store for state in cache.groups for store in state.stores):
        pages = store.pages
        if isinstance(pages, ExactPages):
            k, v = pages.k, pages.v
        else:
            key, value = pages.layout.unpack(pages.arrays)
            k = dequantize_original(pages.layout.codec.key, key)
            v = dequantize_original(pages.layout.codec.value, value)
        out.append((k[:, :, 0], v[:, :, 0]))
    return out


@dataclasses.dataclass(frozen=True)
class Keeps:
    """What one of a layer's stores is for; DESIGN section 2 in words of single positions."""

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
    """What DESIGN promises, in sets and lists. No rings, no stacks, no counts."""

    def __init__(self, config: CacheConfig):
        self.config, self.stores, self.capacity = config, [], []
        for group in config.groups:
            for coded, store in ((False, group.exact), (True, group.body)):
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
    """Asserts every invariant of DESIGN section 3, and that cache and model say the same."""
    cache, contents = jax.device_get((cache, read_all(cache)))
    for name in ("lengths", "pending", "starved", "too_long"):
        assert getattr(cache, name).tolist() == getattr(model, name), name
    assert cache.config.pages is not None or not any(model.starved), "a full reserve ran out"
    rest = zip(model.stores, model.tables, contents, strict=True)
    for group, state in zip(cache.config.groups, cache.groups, strict=True):
        for store in state.stores:
            keeps, tables, values = next(rest)
            check_pool(store)
            check_tables(keeps, store, tables, model)
            check_contents(group, keeps, store, tables, values, model)


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
    assert not any(x[:, 0].any() for x in jax.tree.leaves(store.pages)), "null page written"


def number_of(store, b, logical):
    """Id of a page, which stands in one of two tables."""
    ring, sinks = store.tables.ring[b], store.tables.sinks[b]
    return int(sinks[logical] if logical < len(sinks) else ring[logical % len(ring)])


def check_tables(keeps, store, tables, model):
    spec = keeps.spec
    physical = {}  # of each model page: shared iff shared there
    for b, pages in enumerate(tables):
        entries = np.concatenate([store.tables.ring[b], store.tables.sinks[b]])
        named = entries[entries != 0].tolist()
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

    layers, pools = EXACT_LAYERS, (None, 7, 14)

    @initialize(data=st.data())
    def create(self, data):
        pages = data.draw(st.sampled_from(self.pools), "pages")
        self.pair = Pair(make_config(pages, layers=self.layers))

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


class MixedMachine(CacheMachine):
    layers, pools = MIXED_LAYERS, (None, 9)


class OtherMachine(CacheMachine):
    layers, pools = OTHER_LAYERS, (None, 11)


CacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30)
for machine in (MixedMachine, OtherMachine):
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
test_random_operations = pytest.mark.slow(CacheMachine.TestCase)
test_random_operations_with_codecs = pytest.mark.slow(MixedMachine.TestCase)
test_random_operations_with_other_codecs = pytest.mark.slow(OtherMachine.TestCase)


def needed_width(keeps, step, max_tokens, most=90):
    """Slots of a ring that holds whatever a step may need beside the sinks, at any alignment."""
    widest = 1
    for length in range(most if max_tokens is None else max_tokens + 1):
        for new in range(step + 1 if max_tokens is None else min(step, max_tokens - length) + 1):
            sinks = keeps.sink_pages if keeps.lossy or not keeps.coded else set()
            ring = held(keeps, length, new) - sinks
            widest = max(widest, max(ring) - min(ring) + 1) if ring else widest
    return widest


@pytest.mark.parametrize("page_size", [1, 3, 4])
@pytest.mark.parametrize("recent_pages", [0, 1, 2, 3])
def test_rings_are_as_wide_as_they_must_be(page_size, recent_pages):
    """Whatever the step, the window, the sinks: never narrower, and unless sequences end, exact."""
    for step in (1, 2, page_size, page_size + 1, 2 * page_size + 3):
        for codec_sinks, sink_tokens in ((0, 0), (5, 0), (2, 7)):
            windows = [None] + [recent_pages * page_size + more for more in (0, 1, 2, 7)]
            for window in windows:
                if window == 0:
                    continue
                options = dict(window=window, sink_tokens=sink_tokens if window else 0)
                spec = lossy(recent_pages, codec_sinks, **options)
                for max_tokens in (1, 2, 5, 23, 46) if window is None else (1, 2, 5, 46, None):
                    config = CacheConfig(
                        layers=(spec,),
                        batch=2,
                        max_tokens=max_tokens,
                        max_new_tokens=step,
                        page_size=page_size,
                    )
                    (group,) = config.groups
                    for coded, store in ((False, group.exact), (True, group.body)):
                        if store is None:
                            continue
                        keeps = Keeps(group.spec, coded, page_size)
                        needed = needed_width(keeps, step, max_tokens)
                        said = (page_size, step, spec, max_tokens, coded, needed, store.width)
                        assert store.width >= needed, said
                        assert store.width == needed or max_tokens, said


def test_numbers_survive_the_codec():
    numbers = digits(np.arange(0, 1 << 20, 977), 3)
    codec = MIXED_LAYERS[0].kv_codec.key
    np.testing.assert_array_equal(codec.dequantize(codec.quantize(numbers)), numbers)
    assert len(np.unique(numbers, axis=0)) == len(numbers)


def test_all_sequences_run_to_their_end_on_a_full_reserve():
    for layers in (EXACT_LAYERS, MIXED_LAYERS, OTHER_LAYERS):
        pair = Pair(make_config(layers=layers))
        for new in (STEP, STEP, 1, STEP, MAX_TOKENS - 3 * STEP - 1):
            pair.append([new] * BATCH)
        assert pair.cache.lengths.tolist() == [MAX_TOKENS] * BATCH


def test_rejected_tokens_leave_no_trace_in_codes():
    """A chunk quantizes pages for its own queries, takes them back, and completes them anew."""
    for layers in (MIXED_LAYERS, OTHER_LAYERS):
        pair = Pair(make_config(layers=layers))
        pair.append([6, 11, 12, 1])
        pair.append([12, 12, 12, 12], [1, 2, 0, 11])
        pair.append([12, 12, 12, 12], [3, 0, 1, 12])
        pair.append([12, 5, 1, 4])
        for _ in range(5):
            pair.append([1, 1, 1, 1])


def test_forks_in_the_middle_of_pages_write_codes_of_their_own():
    for layers in (MIXED_LAYERS, OTHER_LAYERS):
        pair = Pair(make_config(layers=layers))
        pair.append([12, 0, 0, 0])
        pair.append([11, 5, 0, 0])
        pair.fork([0, 0, 1], [1, 2, 3])
        for _ in range(3):
            pair.append([3, 1, 6, 12], [3, 1, 2, 12])
        pair.free([True, False, True, False])
        pair.append([12, 4, 1, 0])


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
