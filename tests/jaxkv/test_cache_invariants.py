"""Random operations on a cache and on the model of its contract: they agree after each.

Layers of every kind side by side: all tokens, windows that are no multiple of the page, sinks,
codecs with none to three recent pages and with sinks of their own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import jaxkv
from jaxkv import CacheConfig, KVCache, LayerSpec
from jaxkv.codecs import KVCodec
from pallas_kernels.codecs.affine import MinMax
from tests.jaxkv.cache_model import (
    BATCH,
    MAX_TOKENS,
    PAGE,
    STEP,
    Keeps,
    Pair,
    by_kind,
    commit,
    digits,
    held,
    i32,
    write,
)

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


ONES = np.ones((BATCH, STEP), np.int32)
SEQUENCES = st.integers(0, BATCH - 1)
NEW_TOKENS = st.sampled_from([0, 0, 1, 1, *range(2, STEP + 2)])  # three pages; one is too long


def per_sequence(strategy):
    return st.tuples(*[strategy] * BATCH)


class CacheMachine(RuleBasedStateMachine):
    """Hypothesis drives a `Pair`; pools that suffice for all, or that starve some."""

    layers: tuple[LayerSpec, ...]
    pools: tuple[int | None, ...]  # each is compiled

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
        for most in (STEP, 1):  # the last page by single tokens
            self.pair.append([most * (b == greedy) for b in range(BATCH)])
            while not self.pair.model.starved[greedy] and not self.pair.model.too_long[greedy]:
                self.pair.append([most * (b == greedy) for b in range(BATCH)])
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

    def teardown(self):
        if hasattr(self, "pair"):  # data may run out before the first step
            jaxkv.check(self.pair.cache)


class ExactMachine(CacheMachine):
    layers, pools = EXACT_LAYERS, (None, 9)

    @rule(dropped=per_sequence(NEW_TOKENS), new_tokens=per_sequence(NEW_TOKENS))
    def prepare_again(self, dropped, new_tokens):
        self.pair.write(dropped)
        self.pair.append(new_tokens)


class MixedMachine(CacheMachine):
    layers, pools = MIXED_LAYERS, (9,)


class OtherMachine(CacheMachine):
    layers, pools = OTHER_LAYERS, (11,)


ExactMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
for machine in (MixedMachine, OtherMachine):
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
test_random_operations = pytest.mark.slow(ExactMachine.TestCase)
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
                    for coded, store in by_kind(config, group).items():
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
    assert pair.cache.stores[0].pool.free_pages == 0
    pair.free([True, True, True, False])
    pair.free([False, False, False, True])
    assert pair.cache.pages_in_use.tolist() == [0, 0, 0]


def test_fork_takes_plain_numbers():
    cache = commit(write(KVCache.create(make_config()), i32([3, 0, 0, 0]), ONES), i32([3, 0, 0, 0]))
    cache = jax.jit(lambda cache: cache.fork(0, 2), donate_argnums=0)(cache)
    assert cache.lengths.tolist() == [3, 0, 3, 0]


def test_counts_for_another_batch_are_refused():
    cache = KVCache.create(make_config())
    for operation in (cache.prepare, cache.prepare(i32([0] * 4)).commit):
        with pytest.raises(ValueError, match=r"one per sequence, i32\[4\]: it is int32\[1\].$"):
            operation(i32([1]))
    with pytest.raises(ValueError, match=r"^mask must be true or false .* it is bool\[\].$"):
        cache.free(jnp.bool_(True))
