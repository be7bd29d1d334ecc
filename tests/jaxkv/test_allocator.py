"""The allocator behaves like a list of free pages and a dict of reference counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.allocator import NULL_PAGE, allocate, create_pool, release, retain
from tests.helpers import AS_USERS

PAGES = 9
CALL = 6  # entries per call
OPS = {op.__name__: jax.jit(op, donate_argnames="pool") for op in (allocate, retain, release)}


class Model:
    """A Python list as the stack, and a dict of counts."""

    def __init__(self):
        self.stack = list(range(PAGES - 1, 0, -1))
        self.references = {}

    def allocate(self, wanted):
        pages = [self.stack.pop() if want else NULL_PAGE for want in wanted]
        self.references.update((page, 1) for page in pages if page != NULL_PAGE)
        return pages

    def retain(self, pages):
        for page in filter(None, pages):
            self.references[page] += 1

    def release(self, pages):
        dying = []
        for page in filter(None, pages):
            self.references[page] -= 1
        for page in filter(None, pages):
            if self.references[page] == 0 and page not in dying:
                dying.append(page)  # in the order of first mention
        for page in dying:
            del self.references[page]
        self.stack += dying


def assert_equal(pool, model):
    free = int(pool.free_pages)
    assert np.asarray(pool.free_stack)[:free].tolist() == model.stack
    references = [model.references.get(page, 0) for page in range(PAGES)]
    assert np.asarray(pool.references).tolist() == references


def i32(values):
    return jnp.asarray(values, jnp.int32)


def pool_with(taken):
    pool, page = allocate(create_pool(PAGES), jnp.arange(PAGES - 1, dtype=jnp.int32) < taken)
    assert np.asarray(page)[:taken].tolist() == list(range(1, taken + 1))
    return pool


@settings(max_examples=60)
@given(st.data())
def test_any_mix_of_calls_equals_a_list(data):
    pool, model = create_pool(PAGES), Model()
    for _ in range(data.draw(st.integers(1, 12), "calls")):
        name = data.draw(st.sampled_from(list(OPS)), "op")
        if name == "allocate":
            wanted = data.draw(st.lists(st.booleans(), min_size=CALL, max_size=CALL), "wanted")
            while sum(wanted) > len(model.stack):
                wanted[wanted.index(True)] = False
            pool, page = OPS[name](pool, jnp.asarray(wanted))
            assert np.asarray(page).tolist() == model.allocate(wanted)
        else:
            named = [NULL_PAGE] * CALL
            left = dict(model.references)  # a page is released at most as often as it is held
            for i in range(CALL):
                page = data.draw(st.sampled_from([NULL_PAGE, *model.references]), "page")
                if name == "release" and page != NULL_PAGE:
                    left[page] -= 1
                    page = page if left[page] >= 0 else NULL_PAGE
                named[i] = page
            pool = OPS[name](pool, i32(named))
            getattr(model, name)(named)
        assert_equal(pool, model)


def test_new_pool_hands_out_all_pages_but_the_null_page():
    pool, page = allocate(create_pool(PAGES), jnp.ones((2, 4), bool))
    assert np.asarray(page).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert int(pool.free_pages) == 0
    assert np.asarray(pool.references).tolist() == [0] + [1] * 8


def test_unwanted_entries_get_the_null_page_and_cost_nothing():
    pool, page = allocate(create_pool(PAGES), jnp.asarray([[False, True], [True, False]]))
    assert np.asarray(page).tolist() == [[0, 1], [2, 0]]
    assert int(pool.free_pages) == PAGES - 3


@pytest.mark.parametrize("mentions", [2, 3])
def test_page_released_by_all_its_holders_in_one_call_returns_once(mentions):
    pool = pool_with(3)
    for _ in range(mentions - 1):
        pool = retain(pool, i32([2]))
    pool = release(pool, i32([0, 2, 1] + [2] * (mentions - 1)))
    free = np.asarray(pool.free_stack)[: int(pool.free_pages)].tolist()
    assert sorted(free) == [1, 2, 4, 5, 6, 7, 8]
    assert free[-2:] == [2, 1]  # in the order of first mention
    assert np.asarray(pool.references).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_page_that_someone_still_holds_does_not_return():
    pool = retain(pool_with(2), i32([2, 2]))
    pool = release(pool, i32([2, 2]))
    assert int(pool.free_pages) == PAGES - 3
    assert int(pool.references[2]) == 1


def test_null_pages_are_skipped():
    before = pool_with(2)
    for op in (retain, release):
        after = op(before, i32([[NULL_PAGE] * 3] * 2))
        jax.tree.map(np.testing.assert_array_equal, after, before)


def test_last_released_is_first_reused():
    pool = release(pool_with(4), i32([3, 1]))
    _, page = allocate(pool, jnp.asarray([True, True, True]))
    assert np.asarray(page).tolist() == [1, 3, 5]


@pytest.mark.parametrize("name", list(OPS))
def test_memory_does_not_grow_with_the_pool(name):
    pages = 1 << 20
    pool = jax.eval_shape(lambda: create_pool(pages))
    named = jax.ShapeDtypeStruct((CALL,), bool if name == "allocate" else jnp.int32)
    compiled = OPS[name].lower(pool, named).compile(AS_USERS)
    assert compiled.memory_analysis().temp_size_in_bytes < 10_000  # a copy would be 4 MiB
