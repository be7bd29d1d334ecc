"""A cache can't be misused in silence: static mistakes raise, the others show in checked mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxkv
from jaxkv import CacheConfig, Keep, KVCache, LayerSpec

FULL = LayerSpec(kv_heads=1, head_dim=8, dtype="float32")
WINDOW = dataclasses.replace(FULL, window=5, sink_tokens=3)
HEADS = dict(q=2, k=1, v=1)


def config(*layers, **sizes):
    sizes = dict(batch=3, max_tokens=64, max_new_tokens=8, page_size=4) | sizes
    return CacheConfig(layers=layers or (FULL, FULL), **sizes)


def vectors(tokens=8, batch=3, dtype=jnp.float32):
    shape = lambda heads: (batch, tokens, heads, 8)
    rng = np.random.default_rng(tokens)
    return [jnp.asarray(rng.normal(size=shape(n)), dtype) for n in HEADS.values()]


prepare, commit, fork = map(jax.jit, (KVCache.prepare, KVCache.commit, KVCache.fork))


@functools.partial(jax.jit, static_argnames="tokens")
def attend_all(cache, tokens=8):
    for layer in range(len(cache.config.layers)):
        cache, _ = cache.attend(layer, *vectors(tokens))
    return cache


def leaves(cache):
    return [np.asarray(x) for x in jax.tree.leaves(cache)]


@pytest.mark.parametrize("codec", ["exact", "int8", "tq4"])
def test_to_prepare_twice_is_to_prepare_the_second_time(codec):
    layers = [dataclasses.replace(spec, codec=codec) for spec in (FULL, WINDOW)]
    cache = KVCache.create(config(*layers, pages=9))
    i32 = np.int32
    cache = commit(attend_all(prepare(cache, i32([5, 0, 2]))), i32([5, 0, 2]))
    for first in ([8, 8, 8], [1, 0, 3], [99, 0, 0]):
        twice = prepare(prepare(cache, i32(first)), i32([3, 8, 0]))
        once = prepare(cache, i32([3, 8, 0]))
        jaxkv.check(twice)
        assert twice.pages_in_use.tolist() == once.pages_in_use.tolist()
        for name in ("pending", "starved", "too_long"):
            assert getattr(twice, name).tolist() == getattr(once, name).tolist()
    ended = jax.jit(KVCache.free)(commit(twice, twice.pending), np.ones(3, bool))
    jaxkv.check(ended)
    assert not ended.pages_in_use.any()


def test_calls_in_the_wrong_order_raise():
    cache = KVCache.create(config())
    with pytest.raises(ValueError, match="attend needs a prepared step"):
        cache.attend(0, *vectors())
    with pytest.raises(ValueError, match="commit needs a prepared step"):
        cache.commit([1, 1, 1])
    with pytest.raises(ValueError, match="fork belongs between steps"):
        cache.prepare([1, 1, 1]).fork(0, 1)
    committed = cache.prepare([1, 0, 0]).commit([0, 0, 0])
    with pytest.raises(ValueError, match="attend needs a prepared step"):
        jax.jit(lambda cache: cache.attend(0, *vectors()))(committed)


PREPARED = KVCache.create(config()).prepare([8, 8, 8])
MIXED = KVCache.create(config(FULL, WINDOW)).prepare([8, 8, 8])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PREPARED.prepare(1), r"new_tokens must be whole numbers.*int64\[\]"),
        (lambda: PREPARED.prepare([1, 2]), r"new_tokens must be whole.*i32\[3\]: it is int64\[2\]"),
        (lambda: PREPARED.prepare([1.0, 2.0, 3.0]), "new_tokens must be whole.*float64"),
        (lambda: PREPARED.prepare("all"), "new_tokens must be an array, not str 'all'"),
        (lambda: PREPARED.commit([True] * 3), r"accepted must be whole numbers.*bool\[3\]"),
        (lambda: PREPARED.free(0), r"mask must be true or false.*int64\[\]"),
        (lambda: PREPARED.free([0, 1, 1]), r"mask must be true or false.*int64\[3\]"),
        (lambda: PREPARED.free([0, 2]), r"mask must be true or false.*int64\[2\]"),
        (lambda: KVCache.create(config()).fork(0.0, 1), "src must be the number of a sequence"),
        (lambda: KVCache.create(config()).fork(0, [True]), "dst must be the number"),
        (lambda: KVCache.create((FULL,)), r"config must be a CacheConfig, not \(LayerSpec"),
        (lambda: PREPARED.attend(2, *vectors()), "layer=2 must be a whole number below 2"),
        (lambda: PREPARED.attend(-1, *vectors()), "layer=-1 must be"),
        (lambda: PREPARED.attend(1.0, *vectors()), "layer=1.0 must be"),
        (lambda: PREPARED.attend(True, *vectors()), "layer=True must be"),
        (lambda: PREPARED.attend((0, 99), *vectors()), r"layer=\(0, 99\): the index must be below"),
        (lambda: PREPARED.attend((-1, 0), *vectors()), "group of the layer=-1"),
        (lambda: PREPARED.attend((1, 0), *vectors()), r"layer=\(1, 0\): the group must be below 1"),
        (lambda: PREPARED.attend((0, 0, 0), *vectors()), "must be a number or"),
        (lambda: PREPARED.attend(jnp.float32(1), *vectors()), "layer is float32"),
        (lambda: PREPARED.attend(jnp.arange(2), *vectors()), r"layer is int32\[2\]"),
        (
            lambda: jax.jit(lambda i: MIXED.attend(i, *vectors()))(0),
            "the cache has 2 groups of layers: give",
        ),
        (lambda: PREPARED.attend(0, *vectors(dtype=jnp.int32)), "q.dtype=int32 must be a float"),
        (lambda: PREPARED.attend(0, *vectors(dtype=bool)), "q.dtype=bool must be a float type"),
        (lambda: PREPARED.attend(0, *vectors(dtype=complex)), "q.dtype=complex64 must be"),
        (lambda: PREPARED.attend(0, *vectors(0)), "has no token"),
        (
            lambda: PREPARED.attend(0, *vectors(), soft_cap=0),
            "soft_cap=0.0 must be positive and finite",
        ),
        (lambda: PREPARED.attend(0, *vectors(), soft_cap=True), "soft_cap=True must be a number"),
        (lambda: PREPARED.attend(0, *vectors(), soft_cap="30"), "soft_cap='30' must be a number"),
        (lambda: PREPARED.attend(0, [1.0], *vectors()[1:]), r"q must be an array, not \[1.0\]"),
        (lambda: PREPARED.attend(jnp.int32(2), *vectors()), "layer=2 must be a whole number below"),
        (lambda: PREPARED.attend((0, jnp.int32(99)), *vectors()), "the index must be below 2"),
        (lambda: PREPARED.prepare([[1], [1, 2]]), "new_tokens must be an array, not list"),
        (
            lambda: PREPARED.attend(0, *vectors(), scale=float("nan")),
            "scale=nan must be positive and fin",
        ),
    ],
)
def test_static_mistakes_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [("window", "128"), ("window", True), ("window", 2**31), ("window", 1.5), ("codec", None),
     ("codec", jaxkv.codecs.KVCodec), ("dtype", "float64"), ("dtype", 7), ("dtype", None),
     ("kv_heads", 0), ("head_dim", 2.0), ("sink_tokens", -1)],
)  # fmt: skip
def test_bad_layers_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}=.* must"):
        dataclasses.replace(WINDOW, **{field: value}).checked()


@pytest.mark.parametrize(
    "field, value",
    [("pages", (5, 6)), ("pages", 1), ("batch", True), ("max_tokens", "9"), ("page_size", 4.0),
     ("platform", "cuda"), ("max_new_tokens", 2**31), ("layers", [FULL]), ("layers", ("exact",))],
)  # fmt: skip
def test_bad_configurations_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(config(), **{field: value}).checked()


def test_a_configuration_equals_itself_checked_and_takes_every_name_of_a_type():
    assert config() == config().checked()
    for dtype in (jnp.bfloat16, "bfloat16", jnp.dtype("bfloat16"), np.dtype(jnp.bfloat16)):
        spec = LayerSpec(kv_heads=1, head_dim=8, dtype=dtype)
        assert spec == LayerSpec(kv_heads=1, head_dim=8) and spec.dtype == "bfloat16"
        assert Keep(dtype=dtype) == Keep(dtype="bfloat16")


def test_too_few_key_means_are_named():
    codec = dataclasses.replace(jaxkv.codecs.get_codec("tq4"), key_mean="static")
    layers = [dataclasses.replace(FULL, codec=codec)] * 2
    for means in ([np.zeros((1, 8))], [np.zeros((1, 8))] * 3, 3, np.zeros(())):
        with pytest.raises(
            ValueError, match="key_means must have one mean for each of 2 layers, not"
        ):
            KVCache.create(config(*layers), key_means=means)


def test_forks_out_of_range_do_nothing():
    counts = np.int32([5, 2, 0])
    cache = commit(attend_all(prepare(KVCache.create(config()), counts)), counts)
    for src, dst in ((0, 3), (0, -1), (3, 1), (-1, 1), ([0, 1], [7, 1])):
        forked = fork(cache, np.int32(src), np.int32(dst))
        jaxkv.check(forked)
        for before, after in zip(leaves(cache), leaves(forked), strict=True):
            np.testing.assert_array_equal(before, after)


def test_a_traced_layer_is_served_where_one_group_holds_all():
    def step(cache, layer):
        return cache.attend(layer, *vectors())

    stepped = jax.lax.scan(step, PREPARED, jnp.arange(2))[0]
    for a, b in zip(leaves(stepped), leaves(attend_all(PREPARED)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("codec", ["exact", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("jit", [True, False])
def test_gradients_are_refused_in_one_sentence(codec, jit):
    cache = KVCache.create(config(dataclasses.replace(FULL, codec=codec))).prepare([8, 8, 8])
    loss = lambda k: cache.attend(0, vectors()[0], k, vectors()[2])[1].sum()
    loss = jax.jit(loss) if jit else loss
    with pytest.raises(NotImplementedError, match="inference only: it has no gradient"):
        jax.grad(loss)(vectors()[1])


def checked(step, *args):
    """What checked mode says about a step; None if nothing."""
    error, _ = _wrapped(step)(*args)
    return error.get()


@functools.cache
def _wrapped(step):
    return jax.jit(checkify.checkify(step))


def test_checked_mode_finds_what_depends_on_data():
    cache = KVCache.create(config(pages=5))

    def step(cache, new, accepted, tokens=8, layers=2):
        cache = cache.prepare(new)
        for layer in range(layers):
            cache, _ = cache.attend((0, jnp.int32(layer)), *vectors(tokens))
        return cache.commit(accepted)

    ones = jnp.ones(3, jnp.int32)
    assert checked(step, cache, ones, ones) is None
    assert checked(step, cache, 8 * ones, jnp.int32([8, 8, 0])) is None
    assert "see starved and too_long" in checked(step, cache, 8 * ones, 8 * ones)
    assert "see starved and too_long" in checked(step, cache, 9 * ones, ones)
    assert "q has 1" in checked(lambda *a: step(*a, tokens=1), cache, 2 * ones, ones)
    said = checked(lambda *a: step(*a, layers=1), cache, ones, ones)
    assert "layer 1 was attended 0 times" in said

    def one_twice(cache):
        cache = cache.prepare(ones)
        for layer in (1, 1):  # traced, or it would show at once
            cache, _ = cache.attend((0, ones[0] * layer), *vectors())
        return cache.commit(ones)

    assert "layer 0 was attended 0 times" in checked(one_twice, cache)
    assert "layer 2 is out of range" in checked(lambda *a: step(*a, layers=3), cache, ones, ones)
    fork = lambda src, dst: checked(KVCache.fork, cache, jnp.int32(src), jnp.int32(dst))
    assert fork([0, 1], [1, 2]) is None
    assert "names a sequence twice" in fork([0, 1], [2, 2])
    assert "src=" in fork([5], [1])


def test_counts_beyond_int32_are_too_many_and_not_wrapped():
    cache = KVCache.create(config())
    for new in (np.uint32([2**32 - 1, 1, 0]), np.int64([2**32 + 1, 1, 0]), [2**31, 1, 0]):
        prepared = cache.prepare(new)
        assert prepared.too_long.tolist() == [True, False, False]
        assert prepared.pending.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["sink_logits", "q_sink"])
def test_no_operand_has_a_gradient(name):
    spec = dataclasses.replace(WINDOW, sink_positions="cache")
    cache = KVCache.create(config(spec)).prepare([8, 8, 8])
    given = dict(sink_logits=jnp.ones(2), q_sink=vectors()[0])
    loss = lambda x: cache.attend(0, *vectors(), **given | {name: x})[1].sum()
    with pytest.raises(NotImplementedError, match="inference only: it has no gradient"):
        jax.grad(loss)(given[name])


def test_gradients_that_stop_before_the_cache_are_served():
    cache = KVCache.create(config(FULL)).prepare([8, 8, 8])

    def loss(x):
        still = jax.lax.stop_gradient(x)
        return (x * cache.attend(0, still, *vectors()[1:])[1]).sum()

    q = vectors()[0]
    got = jax.jit(jax.grad(loss))(q)
    np.testing.assert_allclose(got, cache.attend(0, *vectors())[1], atol=1e-6)


def test_tokens_for_key_means_are_ids():
    for tokens in ([1.0, 2.0], "text", [[1, 2]], [True, True], [1, -2]):
        with pytest.raises(ValueError, match="^tokens must be a flat sequence of token ids, not "):
            jaxkv.fit_key_means(None, tokens)  # type: ignore[arg-type]


def some_layers(cache, *layers, accepted=(1, 1, 1)):
    cache = cache.prepare([1, 1, 1])
    for layer in layers:
        cache, _ = cache.attend(layer, *vectors(1))
    return cache.commit(accepted)


@pytest.mark.parametrize("traced", [True, False])
def test_layers_that_a_step_misses_or_repeats_show_where_it_is_traced(traced):
    cache = KVCache.create(config(FULL, WINDOW, FULL))
    run = jax.eval_shape if traced else lambda step: step()
    says = "^commit keeps tokens that layers 1, 2 did not attend: call attend once for every layer"
    with pytest.raises(ValueError, match=says):
        run(lambda: some_layers(cache, 0))
    with pytest.raises(ValueError, match="^layer 2 is attended twice in one step."):
        run(lambda: some_layers(cache, 2, 0, 2))
    with pytest.raises(ValueError, match="that layer 0 did not attend"):
        run(lambda: some_layers(cache, 2, (1, 0), accepted=jnp.int32([0, 1, 0])))
    run(lambda: some_layers(cache, 0, 1, 2))
    run(lambda: some_layers(cache))  # a dry run of the allocator
    run(lambda: some_layers(cache, 0, accepted=[0, 0, 0]))  # dropped


def test_layers_are_not_counted_where_a_step_is_traced_in_parts():
    cache = KVCache.create(config(FULL, WINDOW, FULL))
    attend = lambda layer, cache: cache.attend(layer, *vectors(1))[0]

    def step(cache):
        cache = attend(2, cache.prepare([1, 1, 1]))
        for layer in range(2):
            cache = jax.jit(attend, static_argnums=0)(layer, cache)
        return jax.lax.cond(
            True, lambda c: c.commit(c.pending), lambda c: c.commit([1, 1, 1]), cache
        )

    assert jax.eval_shape(step, cache).lengths.shape == (3,)


def test_of_forks_into_one_sequence_the_first_counts():
    cache = attend_all(KVCache.create(config()).prepare([5, 7, 0])).commit([5, 7, 0])
    forked = cache.fork([0, 1], [2, 2])
    jaxkv.check(forked)
    assert forked.lengths.tolist() == [5, 7, 5]
    swapped = cache.fork([0, 0, 1], [1, 1, 0])
    jaxkv.check(swapped)
    assert swapped.lengths.tolist() == [7, 5, 0]


@pytest.mark.parametrize("max_tokens", [None, 2**31 - 1])
def test_positions_stay_within_int32(max_tokens):
    cache = KVCache.create(config(WINDOW, max_tokens=max_tokens))
    near = dataclasses.replace(cache, lengths=cache.lengths + cache.config.longest - 3)
    prepared = near.prepare([4, 3, 0])
    assert prepared.too_long.tolist() == [True, False, False]
    assert (prepared.lengths + prepared.pending).tolist()[1] < 2**31


def test_windows_and_sinks_together_stay_within_int32():
    says = "^window=2147483647 and sink_tokens=1 must be below 2.*31 together.$"
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(WINDOW, window=2**31 - 1, sink_tokens=1).checked()


@pytest.mark.parametrize("operation", [KVCache.create, jaxkv.plan, jaxkv.explain])
def test_what_is_no_configuration_is_named(operation):
    with pytest.raises(ValueError, match="^config must be a CacheConfig, not 'gpt2'.$"):
        operation("gpt2")


@pytest.mark.parametrize("part", [None, jaxkv.codecs.Int8, "int8"])
def test_parts_of_a_codec_are_codecs(part):
    with pytest.raises(ValueError, match="^value=.* must be a TensorCodec, such as MinMax"):
        jaxkv.codecs.KVCodec(name="own", key=jaxkv.codecs.Int8(), value=part)


def test_lists_may_hold_traced_numbers():
    cache = KVCache.create(config())
    pending = jax.jit(lambda cache, n: cache.prepare([n, 1, 2]).pending)(cache, 3)
    assert pending.tolist() == [3, 1, 2] and pending.dtype == jnp.int32


def test_pools_have_no_gradient_either():
    cache = KVCache.create(config(dataclasses.replace(FULL, codec="int8"))).prepare([8, 8, 8])

    def loss(factors):
        arrays = cache.stores[0].pages.arrays | factors
        pages = dataclasses.replace(cache.stores[0].pages, arrays=arrays)
        stores = (dataclasses.replace(cache.stores[0], pages=pages),)
        return dataclasses.replace(cache, stores=stores).attend(0, *vectors())[1].sum()

    arrays = cache.stores[0].pages.arrays
    factors = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    with pytest.raises(NotImplementedError, match="inference only: it has no gradient"):
        jax.eval_shape(jax.grad(loss), factors)
