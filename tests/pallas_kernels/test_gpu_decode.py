"""The GPU decode kernel equals the dense formula on the values that the pages stand for.

On a CPU the kernel is interpreted; with a GPU the same cases run compiled (pytest -m gpu).
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import CacheConfig, KVCache, LayerSpec
from jaxkv.codecs import get_codec
from pallas_kernels.codecs.affine import Float8, Int8, MinMax
from pallas_kernels.codecs.codebooks import get_codebook
from pallas_kernels.codecs.codec import KVCodec, page_mean
from pallas_kernels.layouts.packing import pack_planes
from pallas_kernels.layouts.token_major import TokenMajor
from pallas_kernels.codecs.turboquant import TurboQuant
from pallas_kernels.backends import interpret_kernels
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.paged_attention import (
    gpu,
    gpu_chunks,
    gpu_decode,
    gpu_dequant,
    gpu_plan,
    gpu_tiles,
    paged_attention,
)
from pallas_kernels.paged_attention.gpu_tiles import DecodeConfig
from pallas_kernels.pages import CodedPages, ExactPages
from pallas_kernels.rule import PageLag, Rule
from pallas_kernels.segment import Queries, Segment

LAYERS, LAYER = 2, 1
# Relative L2 error: rounding of probabilities, of queries of coded pages and of levels.
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 3e-3, "coded": 3e-3}
SMALL = DecodeConfig(block=32, programs=10, good_tokens=32, least_tokens=32)
EDGES = dataclasses.replace(SMALL, mask_all=False)
TRANSPOSED = dataclasses.replace(EDGES, transposed=True)


@pytest.fixture(params=["interpret", pytest.param("compiled", marks=pytest.mark.gpu)])
def interpret(request):
    return request.param == "interpret"


@pytest.fixture(autouse=True)
def on_the_host():
    """Cases and what they are compared with: a GPU would compile every small step of theirs."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def on_the_device():
    """Where the kernel runs: the GPU, if there is one."""
    return jax.default_device(jax.local_devices()[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    q: jax.Array
    pages: ExactPages | CodedPages
    table: jax.Array
    where: dict[str, jax.Array]
    k: jax.Array  # [batch, tokens, kv_heads, head_dim], what the pages stand for
    v: jax.Array
    page_size: int

    def attend(
        self, *, interpret, config=None, window=None, sink_tokens=0, lag=None, soft_cap=None
    ):
        rule = Rule(window=window, sink_tokens=sink_tokens, lag=lag)
        run = functools.partial(
            gpu_decode.paged_attention,
            rule=rule,
            scale=0.2,
            soft_cap=soft_cap,
            out_dtype=jnp.float32,
            interpret=interpret,
            config=config,
        )
        where = self.where
        queries = Queries(self.q, where["q_start"], where["q_lens"])
        segment = Segment(self.table, where["kv_start"], where["kv_stop"])
        with on_the_device():
            return jax.jit(lambda *a: run(*a, layer=jnp.int32(LAYER)))(queries, self.pages, segment)

    def dense(self, *, window=None, sink_tokens=0, lag=None, **options):
        start, count, first, stop = (
            self.where[name][:, None] for name in ("q_start", "q_lens", "kv_start", "kv_stop")
        )
        row = jnp.arange(self.q.shape[1], dtype=jnp.int32)[None]
        j = jnp.arange(self.k.shape[1], dtype=jnp.int32)[None]
        q_position = jnp.where(row < count, start + row, -1)
        k_position = jnp.where((j >= first) & (j < stop), j, -1)
        rule = Rule(window=window, sink_tokens=sink_tokens, lag=lag)
        return dense_attention(
            self.q, self.k, self.v, q_position, k_position, scale=0.2, rule=rule, **options
        )


def make_case(
    store="bfloat16",
    *,
    lengths=(1, 33, 64, 150),
    q_lens=None,
    kv_start=None,
    page_size=16,
    kv_heads=2,
    group=3,
    head_dim=64,
    word_bits=16,
    width=None,
    poison=True,
    seed=0,
):
    """A case whose pages are shuffled, with poison wherever no token of a segment stands.

    `store` is a float dtype, or a `KVCodec`.
    """
    rng = np.random.default_rng(seed)
    batch, tokens = len(lengths), -(-max(lengths) // page_size) * page_size
    q_lens = (1,) * batch if q_lens is None else q_lens
    kv_start = (0,) * batch if kv_start is None else kv_start
    width = tokens // page_size + 1 if width is None else width
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    k, v = (normal(batch, kv_heads, tokens, head_dim) for _ in range(2))
    mean = None
    if isinstance(store, KVCodec):
        layout = TokenMajor(
            codec=store,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            word_bits=word_bits,
        )
        k_mean = jnp.zeros(())
        if store.key_mean == "page":
            k = k + normal(1, kv_heads, 1, head_dim)
            paged = k.reshape(batch, kv_heads, -1, page_size, head_dim)
            mean = page_mean(store.key.rotate(paged), -2)
            k_mean = jnp.repeat(store.key.unrotate(mean.astype(jnp.float32)), page_size, axis=2)
            keys = store.key.quantize(k, k_mean)
        else:
            keys = store.key.quantize(k)
        values = store.value.quantize(v)
        k = store.key.unrotate(store.key.dequantize(keys)) + k_mean
        v = store.value.unrotate(store.value.dequantize(values))
        arrays = {n: np.asarray(x) for n, x in layout.pack(keys, values).items()}
        axes = layout.token_axes
    else:
        k, v = (x.astype(store) for x in (k, v))
        arrays, axes = {"k": np.asarray(k), "v": np.asarray(v)}, {"k": -2, "v": -2}
        k, v = (x.astype(jnp.float32) for x in (k, v))
    pages = 2 + batch * width
    free = list(rng.permutation(np.arange(1, pages - 1)))
    table = np.full((batch, width), 10**6, np.int32)  # beyond the pool: never looked up
    pools = {}
    for name, x in arrays.items():
        shape = list(x.shape[1:])
        shape[axes[name]] = page_size
        pools[name] = np.full((LAYERS, pages, *shape), _poison(x.dtype) if poison else 0, x.dtype)
    means = np.full((LAYERS, pages, kv_heads, head_dim), np.nan, np.float16)
    for b, (start, stop) in enumerate(zip(kv_start, lengths, strict=True)):
        for g in range(start // page_size, -(-stop // page_size)):
            page = table[b, g % width] = free.pop()
            if mean is not None:
                means[LAYER, page] = mean[b, :, g]
            low, high = max(start, g * page_size), min(stop, (g + 1) * page_size)
            for name, x in arrays.items():
                source = np.moveaxis(x[b], axes[name], 0)
                target = np.moveaxis(pools[name][LAYER, page], axes[name], 0)
                target[low % page_size : low % page_size + high - low] = source[low:high]
    pools = {n: jnp.asarray(x) for n, x in pools.items()}
    if isinstance(store, KVCodec):
        stored = CodedPages(
            arrays=pools, key_mean=None if mean is None else jnp.asarray(means), layout=layout
        )
    else:
        stored = ExactPages(**pools)
    where = dict(
        q_start=np.subtract(lengths, q_lens), q_lens=q_lens, kv_start=kv_start, kv_stop=lengths
    )
    q = normal(batch, max(1, *q_lens), kv_heads * group, head_dim)
    row = np.arange(q.shape[1])[None, :, None, None] >= np.reshape(q_lens, (-1, 1, 1, 1))
    return Case(
        q=jnp.where(row, np.nan, q).astype(jnp.bfloat16),
        pages=stored,
        table=jnp.asarray(table),
        where={name: jnp.asarray(x, jnp.int32) for name, x in where.items()},
        k=jnp.swapaxes(k, 1, 2),
        v=jnp.swapaxes(v, 1, 2),
        page_size=page_size,
    )


def _poison(dtype):
    return np.nan if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).max


def assert_close(got, expected, tolerance):
    (out, lse), (want, want_lse) = got, expected
    out, lse, want, want_lse = map(np.asarray, (out, lse, want, want_lse))
    seen = np.isfinite(want_lse)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    np.testing.assert_array_equal(out[~seen], 0)
    np.testing.assert_array_equal(lse[~seen], -np.inf)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    assert error <= tolerance, error
    np.testing.assert_allclose(lse[seen], want_lse[seen], atol=3 * tolerance)


CONFIGS = {"flat": SMALL, "edges": EDGES, "transposed": TRANSPOSED}
MAKERS = {
    "decode": make_case,
    "verify": functools.partial(make_case, lengths=(4, 33, 64, 150), q_lens=(3, 1, 0, 4)),
    "wrapped": functools.partial(
        make_case, lengths=(7, 61, 200, 90), q_lens=(2, 1, 3, 0), kv_start=(0, 21, 121, 70), width=6
    ),
}
MASKS = [
    dict(),
    dict(window=20),
    dict(window=40, sink_tokens=5),
    dict(lag=PageLag(16, least=1)),
    dict(lag=PageLag(16, most=2), soft_cap=1.5),
]


# Each rule with each kind of segment; the orientations and loops take turns.
CASES = [
    (make, options, list(CONFIGS)[(i + j) % len(CONFIGS)])
    for i, make in enumerate(MAKERS)
    for j, options in enumerate(MASKS)
]


@pytest.mark.parametrize("make, options, config", CASES, ids=str)
def test_exact_pages_equal_dense(make, options, config, interpret):
    case = MAKERS[make]()
    got = case.attend(interpret=interpret, config=CONFIGS[config], **options)
    assert_close(got, case.dense(**options), TOLERANCE["bfloat16"])


@pytest.mark.slow
def test_many_rows(interpret):
    """More rows than one warp takes: a group of 7 and 4 drafts."""
    shape = dict(lengths=(4, 70), q_lens=(4, 3), group=7, kv_heads=1)
    for store, tolerance in (("bfloat16", "bfloat16"), (get_codec("4bit_nc"), "coded")):
        case = make_case(store, **shape)
        assert_close(case.attend(interpret=interpret), case.dense(), TOLERANCE[tolerance])


@pytest.mark.parametrize("lookups", ["k", ""])
def test_levels_are_looked_up_or_computed(lookups, interpret):
    case = make_case(get_codec("tq3"), lengths=(1, 70), page_size=32)
    config = dataclasses.replace(TRANSPOSED, lookups=lookups)
    assert_close(case.attend(interpret=interpret, config=config), case.dense(), TOLERANCE["coded"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_float_types(dtype, interpret):
    case = make_case(dtype)
    assert_close(case.attend(interpret=interpret, config=EDGES), case.dense(), TOLERANCE[dtype])


SHAPES = [
    dict(head_dim=80, group=1),
    dict(head_dim=96, group=7, page_size=32, codec="tq3"),
    dict(head_dim=128, group=4, page_size=64, word_bits=32),
    dict(head_dim=192, group=2, page_size=128, word_bits=32),
    dict(head_dim=256, group=16, kv_heads=1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("store", ["bfloat16", get_codec("3bit_nc")], ids=["bfloat16", "3bit_nc"])
def test_shapes(store, shape, interpret):
    shape = dict(shape)
    codec = shape.pop("codec", None)
    if store != "bfloat16" and codec is not None:
        store = get_codec(codec)
    if store == "bfloat16":
        shape.pop("word_bits", None)
    case = make_case(store, lengths=(1, 70, 129), **shape)
    config = EDGES if store == "bfloat16" else TRANSPOSED
    tolerance = TOLERANCE["bfloat16" if store == "bfloat16" else "coded"]
    assert_close(case.attend(interpret=interpret, config=config), case.dense(), tolerance)


def kernel_and_reference(case, interpret, options, *, sinks=None, table=None, kv_start=None):
    """What the op gives by the kernel, and by the reference."""
    rule = Rule(**{n: x for n, x in options.items() if n in ("window", "sink_tokens", "lag")})
    rest = {n: x for n, x in options.items() if n not in ("window", "sink_tokens", "lag")}
    op = functools.partial(paged_attention, rule=rule, layer=LAYER, scale=0.2, **rest)
    queries = Queries(case.q, case.where["q_start"], case.where["q_lens"])
    start = case.where["kv_start"] if kv_start is None else kv_start
    table = case.table if table is None else table
    segment = Segment(table, start, case.where["kv_stop"], sinks)
    run = lambda backend: jax.jit(functools.partial(op, backend=backend))(
        queries, case.pages, segment
    )
    with interpret_kernels() if interpret else contextlib.nullcontext(), on_the_device():
        got = run("gpu")
    return got, run("reference")


# More rows than a program takes, in blocks of 8 or 42 tokens: the last one partly or all padding.
CHUNK = dict(lengths=(20, 49, 130, 75), q_lens=(20, 17, 0, 1), group=16, kv_heads=1)
LONG = dict(lengths=(50, 131), q_lens=(50, 45), group=3)
CHUNK_CASES = {
    "full": ("bfloat16", CHUNK, dict()),
    "window": ("bfloat16", LONG, dict(window=37)),
    "window, sinks": ("float16", CHUNK, dict(window=27, sink_tokens=20, soft_cap=1.5)),
    "recent pages": ("bfloat16", LONG, dict(lag=PageLag(16, most=2))),
    "head_dim 256": ("bfloat16", CHUNK | dict(head_dim=256), dict()),
    "int8": ("int8", CHUNK, dict(window=27)),
    "fp8_e4m3": ("fp8_e4m3", LONG, dict()),
    "k8v4": ("k8v4", CHUNK, dict()),
    "tq4": ("tq4", LONG | dict(head_dim=128), dict(lag=PageLag(16, least=1))),
    "tq3": ("tq3", CHUNK, dict(window=40)),
}


@pytest.mark.parametrize("case", CHUNK_CASES.values(), ids=CHUNK_CASES)
def test_chunks_of_prompts(case, interpret):
    store, shape, options = case
    dtypes = ("bfloat16", "float16")
    case = make_case(store if store in dtypes else get_codec(store), **shape)
    got, want = kernel_and_reference(case, interpret, options)
    assert_close(got, want, TOLERANCE[store if store in dtypes else "coded"])


def test_one_token_blocks(interpret):
    """More query heads of a kv head than half a block has rows; the last two tokens are padding."""
    case = make_case(lengths=(3, 20), q_lens=(3, 1), group=70, kv_heads=1)
    got, want = kernel_and_reference(case, interpret, dict(window=9))
    assert_close(got, want, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("tokens", [1, 9], ids=["few", "chunk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_of_the_output(dtype, tokens, interpret):
    case = make_case(lengths=(20, 49), q_lens=(tokens, 1))
    got, want = kernel_and_reference(case, interpret, dict(out_dtype=jnp.dtype(dtype)))
    assert got.out.dtype == want.out.dtype == dtype
    as_float32 = lambda pair: (pair[0].astype(jnp.float32), pair[1])
    assert_close(as_float32(got), as_float32(want), TOLERANCE["bfloat16"])


SINK_CASES = {
    "window": ("bfloat16", (1, 1, 1, 1, 1), dict(window=40, sink_tokens=5)),
    "window, drafts": ("bfloat16", (3, 2, 4, 0, 4), dict(window=27, sink_tokens=20)),
    "recent pages": ("bfloat16", (1, 1, 1, 1, 1), dict(lag=PageLag(16, most=2))),
    "recent pages, drafts": ("bfloat16", (3, 2, 4, 1, 4), dict(lag=PageLag(16, most=1))),
    "codes": ("fp8_e4m3", (2, 1, 4, 1, 3), dict(window=27, sink_tokens=20)),
    "means": ("tq4", (1, 1, 1, 1, 1), dict(window=70, sink_tokens=32)),
    "a chunk": ("bfloat16", (4, 31, 30, 2, 60), dict(window=27, sink_tokens=20)),
    "a chunk, recent pages": ("bfloat16", (4, 31, 30, 0, 60), dict(lag=PageLag(16, most=2))),
}


@pytest.mark.parametrize("case", SINK_CASES.values(), ids=SINK_CASES)
def test_sink_pages_of_a_table_of_their_own(case, interpret):
    """Sequences within the sink pages, at their end, just behind it, and far from it."""
    store, q_lens, options = case
    store = store if store == "bfloat16" else get_codec(store)
    case = make_case(store, lengths=(4, 31, 36, 49, 250), q_lens=q_lens)
    sinks, ring = case.table[:, :2], case.table.at[:, :2].set(10**6)
    start = jnp.full(5, 2 * case.page_size, jnp.int32)
    got, want = kernel_and_reference(
        case, interpret, options, table=ring, sinks=sinks, kv_start=start
    )
    assert_close(got, want, TOLERANCE["bfloat16"])


@pytest.fixture
def few_programs(monkeypatch):
    """Tile sizes as they are chosen, but programs so few that their shares cross sequences.

    Gives a list of the shapes that were planned.
    """
    planned = []

    def plan_work(scalars, *args):
        planned.append(scalars["kv_stop"].shape)
        return gpu_plan.plan_work(scalars, *args)

    def few(choose):
        sizes = dict(programs=6, least_tokens=16, good_tokens=16, unsplit=False)
        return lambda *args: dataclasses.replace(choose(*args), **sizes)

    monkeypatch.setattr(gpu_decode, "plan_work", plan_work)
    monkeypatch.setattr(gpu_decode, "choose_config", few(gpu_tiles.choose_config))
    monkeypatch.setattr(gpu_chunks, "chunk_config", few(gpu_tiles.chunk_config))
    traced = (gpu._attend_few, gpu._attend_chunk)
    for function in traced:
        function.clear_cache()
    yield planned
    for function in traced:
        function.clear_cache()


@pytest.mark.parametrize("case", CHUNK_CASES.values(), ids=CHUNK_CASES)
def test_programs_cross_blocks_of_chunks(case, interpret, few_programs):
    test_chunks_of_prompts(case, interpret)
    assert few_programs


@pytest.mark.parametrize("case", SINK_CASES.values(), ids=SINK_CASES)
def test_programs_cross_sequences_behind_sinks(case, interpret, few_programs):
    test_sink_pages_of_a_table_of_their_own(case, interpret)
    assert few_programs


def own(key, value):
    return KVCodec(name="own", key=key, value=value)


LLOYD = functools.partial(TurboQuant, codebook="lloyd_max")
CODECS = {
    name: get_codec(name)
    for name in ("int8 fp8_e4m3 fp8_e5m2 k8v4 4bit_nc k3v4_nc 3bit_nc tq4 tq3 tq2".split())
} | {
    "quintic_v2": own(TurboQuant(codebook="quintic"), MinMax(2)),
    "lloyd2_lloyd4": own(LLOYD(bits=2), LLOYD(bits=4)),
    "minmax4_minmax8": own(MinMax(4), MinMax(8)),
    "minmax3_int8": own(MinMax(3), Int8()),
}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_codecs_equal_dense(codec, interpret):
    case = make_case(codec, lengths=(1, 33, 130), q_lens=(1, 1, 0))
    options = dict(window=70, soft_cap=3.0) if codec.name in ("tq4", "k8v4", "tq2") else {}
    got = case.attend(interpret=interpret, **options)
    assert_close(got, case.dense(**options), TOLERANCE["coded"])


def test_one_mean_serves_all_pages(interpret):
    case = make_case(get_codec("tq4"), lengths=(1, 150))
    shape = case.pages.key_mean.shape
    rng = np.random.default_rng(1)
    one = jnp.asarray(rng.standard_normal((LAYERS, 1, *shape[2:])), jnp.float16)
    means = (one, jnp.broadcast_to(one, shape))
    got, want = (
        dataclasses.replace(case, pages=dataclasses.replace(case.pages, key_mean=x)).attend(
            interpret=interpret
        )
        for x in means
    )
    np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("word_bits", [16, 32])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "k8v4", "4bit_nc", "tq4", "tq3", "tq2"])
def test_word_sizes_at_128(name, word_bits, interpret):
    case = make_case(
        get_codec(name),
        lengths=(65, 300),
        page_size=64,
        head_dim=128,
        word_bits=word_bits,
        q_lens=(2, 1),
    )
    assert_close(case.attend(interpret=interpret), case.dense(), TOLERANCE["coded"])


@pytest.mark.parametrize("codec", [get_codec("int8"), own(Int8(), MinMax(8))], ids=["u8", "i8"])
def test_bytes_that_are_not_packed(codec, interpret):
    case = make_case(codec, lengths=(1, 33, 130), q_lens=(1, 1, 0), word_bits=8)
    assert_close(case.attend(interpret=interpret), case.dense(), TOLERANCE["coded"])


@pytest.mark.parametrize(
    "bits, name",
    [
        (2, "lloyd_max"),
        (3, "lloyd_max"),
        (4, "lloyd_max"),
        (2, "cubic"),
        (3, "cubic"),
        (4, "cubic"),
        (4, "quintic"),
    ],
)
def test_polynomials_pass_through_the_levels(bits, name):
    codec = TurboQuant(bits=bits, codebook=name)
    levels = gpu_dequant.make_levels(codec)
    t = (np.arange(2**bits) - levels.centre) * levels.step
    value = levels.gain * sum(c * t ** (2 * i + 1) for i, c in enumerate(levels.coefficients))
    np.testing.assert_allclose(value, get_codebook(name, bits).levels, atol=3e-4)


def test_what_is_not_served_is_named():
    with pytest.raises(NotImplementedError, match="^head_dim=32: the GPU kernel serves"):
        make_case(head_dim=32).attend(interpret=True)
    with pytest.raises(NotImplementedError, match="^group=129: the GPU kernel serves up to 128"):
        make_case(group=129, lengths=(1,), kv_heads=1).attend(interpret=True)
    with pytest.raises(NotImplementedError, match="^group=33, q_tokens=4: their product"):
        make_case(group=33, q_lens=(4, 1, 1, 1), lengths=(4, 1, 1, 1)).attend(interpret=True)
    long = make_case("float32", lengths=(9,), q_lens=(9,))
    with (
        pytest.raises(NotImplementedError, match="float32 pages, q_tokens=9: the GPU kernel"),
        interpret_kernels(),
    ):
        kernel_and_reference(long, True, {}, page_table=long.table)
    with pytest.raises(NotImplementedError, match="^word_bits=8: the GPU kernel reads words"):
        make_case(get_codec("tq4"), word_bits=8).attend(interpret=True)
    spec = LayerSpec(kv_heads=2, head_dim=64, codec="fp8_e4m3")
    for_cpus = CacheConfig(layers=(spec,), batch=1, max_tokens=64, page_size=16, platform="cpu")
    [state] = KVCache.create(for_cpus).groups
    with pytest.raises(NotImplementedError, match="^TokensLast: the GPU kernel reads TokenMajor"):
        gpu_decode.check(state.body.pages, q_tokens=1, group=2)


def run_ptx(text, inputs):
    """Runs straight-line PTX on numpy registers, `u32[n]` each, from `$1` on; returns `$0`."""
    registers = {f"${i + 1}": np.asarray(x, np.uint32) for i, x in enumerate(inputs)}
    halves = lambda x: x.view(np.float16).astype(np.float64).reshape(-1, 2)
    packed = lambda x: np.ascontiguousarray(x.astype(np.float16)).view(np.uint32).reshape(-1)

    def read(name):
        if name in registers:
            return registers[name]
        return np.full(inputs[0].shape, int(name, 0), np.uint32)

    for line in text.strip("{}\n").split("\n"):
        op, _, rest = line.split("//")[0].strip().rstrip(";").partition(" ")
        if op == ".reg":
            continue
        target, *names = [x.strip() for x in rest.split(",")]
        args = [read(x) for x in names]
        if op == "prmt.b32":
            bytes_ = np.stack([a >> np.uint32(8 * i) & 255 for a in args[:2] for i in range(4)])
            picks = [read(names[2]) >> np.uint32(4 * i) & 7 for i in range(4)]
            each = np.arange(len(bytes_[0]))
            value = sum(bytes_[pick, each] << np.uint32(8 * i) for i, pick in enumerate(picks))
        elif op == "lop3.b32":
            value = np.zeros_like(args[0])
            for case in range(8):
                if int(names[3], 0) >> case & 1:
                    signs = [a if case >> (2 - i) & 1 else ~a for i, a in enumerate(args[:3])]
                    value |= signs[0] & signs[1] & signs[2]
        elif op in ("shr.u32", "shl.b32"):
            value = args[0] >> args[1] if op == "shr.u32" else args[0] << args[1]
        elif op == "and.b32":
            value = args[0] & args[1]
        elif op == "sub.s32":
            value = args[0] - args[1]
        elif op == "mov.b32":
            value = args[0]
        elif op == "fma.rn.f16x2":
            a, b, c = map(halves, args)
            value = packed(a * b + c)
        elif op == "add.rn.f16x2":
            value = packed(halves(args[0]) + halves(args[1]))
        elif op == "mul.rn.f16x2":
            value = packed(halves(args[0]) * halves(args[1]))
        else:
            raise AssertionError(line)
        registers[target] = value.astype(np.uint32)
    return registers["$0"]


TENSORS = {
    "lloyd2": LLOYD(bits=2), "lloyd3": LLOYD(bits=3), "lloyd4": LLOYD(bits=4),
    "cubic2": TurboQuant(bits=2), "cubic3": TurboQuant(bits=3), "cubic4": TurboQuant(bits=4),
    "quintic4": TurboQuant(codebook="quintic"),
    "minmax2": MinMax(2), "minmax3": MinMax(3), "minmax4": MinMax(4), "minmax8": MinMax(8),
    "int8": Int8(), "e4m3": Float8("e4m3"), "e5m2": Float8("e5m2"),
}  # fmt: skip


def run_asm(order, text, args, constraints, pack, dtype=jnp.float16):
    """`elementwise_inline_asm` by the emulator; elements share registers in this `order`."""
    del constraints
    registers = []
    for x in args:
        x = np.ascontiguousarray(np.asarray(x).reshape(-1)[order])
        if x.dtype.itemsize == 2:
            registers.append(x.view(np.uint32))
        else:
            registers += [np.ascontiguousarray(x[i::pack]).view(np.uint32) for i in range(pack)]
    found = np.empty(order.size, dtype)
    found[order] = run_ptx(text, registers).view(found.dtype)
    return jnp.asarray(found.reshape(args[0].shape))


def unpacked(reader, packed, dims_first) -> np.ndarray:
    """`[tokens, head_dim]` from words as the kernel loads them, by the reader's PTX."""
    turn = (lambda x: jnp.asarray(x.T)) if dims_first and reader.turns_words else jnp.asarray
    loaded, shifts = [], []
    for i, tile in enumerate(reader.tiles):
        word = tile.start + np.arange(tile.columns) % tile.words
        columns = [packed[0][:, word]] + [x[:, word % (reader.words // 2)] for x in packed[1:]]
        loaded.append(tuple(map(turn, columns)))
        amounts = [x[None, : tile.columns] for x in reader.shifts[i]]
        shifts.append([turn(x) if x.any() else None for x in amounts])
    values = np.zeros((len(packed[0]), reader.head_dim))
    operands = reader.operands(loaded, True, shifts, dims_first=dims_first)
    for dims, gain, x in zip(reader.dims, reader.gains(True), operands, strict=True):
        values[:, dims] = gain * np.asarray(x.T if dims_first else x, np.float64)
    return values


@pytest.mark.parametrize("dims_first", [False, True], ids=["rows", "turned"])
@pytest.mark.parametrize("word_bits", [16, 32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192])
@pytest.mark.parametrize("codec", TENSORS.values(), ids=TENSORS)
def test_ptx_unpacks_what_was_packed(codec, head_dim, word_bits, dims_first, monkeypatch):
    """The PTX itself, not its twin, on the words that the layout packs.

    Which words share a register is Triton's choice: here any two may.
    """
    rng = np.random.default_rng(0)
    tokens = 64
    codes = rng.integers(0, 2**codec.bits, (tokens, head_dim)).astype(np.uint8)  # int8: + 128
    if codec.bits == 3 and head_dim % word_bits:
        pytest.skip("the third bits do not fill whole words")
    if isinstance(codec, Float8):
        if word_bits == 32:
            pytest.skip("float8 lies in 16-bit words or in bytes")
        codes[~np.isfinite(codes.view(codec.codes_dtype).astype(np.float32))] = 0  # never stored
    packed = [np.asarray(x) for x in pack_planes(jnp.asarray(codes), codec.bits, word_bits)]
    names = [f"k_{x}" for x in ("codes", "high")[: len(packed)]]
    reader = gpu_dequant.coded_reader("k", codec, head_dim, dict(zip(names, packed, strict=True)))
    orders = {}

    def asm(text, args, *rest, **options):
        order = orders.setdefault(args[0].size, rng.permutation(args[0].size))
        return run_asm(order, text, args, *rest, **options)

    monkeypatch.setattr(gpu_dequant, "_asm", asm)
    if codec.codes_dtype == jnp.int8:
        want = codes - 128.0
    else:
        want = np.asarray(codec.code_values(jnp.asarray(codes.view(codec.codes_dtype))))
    for each in (reader, reader.computed()) if reader.levels.table else (reader,):
        got = unpacked(each, packed, dims_first)
        np.testing.assert_allclose(got, want, atol=4e-3 if codec.rotated else 0)
