"""The polynomials of levels, and the PTX itself, run by an emulator in place of its plain twin."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codecs.affine import Float8, Int8, MinMax
from pallas_kernels.codecs.codebooks import get_codebook
from pallas_kernels.codecs.turboquant import TurboQuant
from pallas_kernels.layouts.packing import pack_planes
from pallas_kernels.paged_attention.triton import readers
from pallas_kernels.paged_attention.triton.levels import make_levels
from tests.pallas_kernels.paged_attention.triton.ptx_emulator import run_asm


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
    levels = make_levels(codec)
    t = (np.arange(2**bits) - levels.centre) * levels.step
    value = levels.gain * sum(c * t ** (2 * i + 1) for i, c in enumerate(levels.coefficients))
    np.testing.assert_allclose(value, get_codebook(name, bits).levels, atol=3e-4)


LLOYD = functools.partial(TurboQuant, codebook="lloyd_max")
TENSORS = {
    "lloyd2": LLOYD(bits=2), "lloyd3": LLOYD(bits=3), "lloyd4": LLOYD(bits=4),
    "cubic2": TurboQuant(bits=2), "cubic3": TurboQuant(bits=3), "cubic4": TurboQuant(bits=4),
    "quintic4": TurboQuant(codebook="quintic"),
    "minmax2": MinMax(2), "minmax3": MinMax(3), "minmax4": MinMax(4), "minmax8": MinMax(8),
    "int8": Int8(), "e4m3": Float8("e4m3"), "e5m2": Float8("e5m2"),
}  # fmt: skip


def unpacked(reader, packed, dims_first) -> np.ndarray:
    """Values `[tokens, head_dim]` that the reader's PTX makes of packed words."""
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
    """Runs the PTX on words that the layout packs.

    Triton chooses which words share a register, so here random ones do.
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
    reader = readers.coded_reader("k", codec, head_dim, dict(zip(names, packed, strict=True)))
    orders = {}

    def inline(text, args, *rest, **options):
        order = orders.setdefault(args[0].size, rng.permutation(args[0].size))
        return run_asm(order, text, args, *rest, **options)

    monkeypatch.setattr(readers, "inline", inline)
    if codec.codes_dtype == jnp.int8:
        want = codes - 128.0
    else:
        want = np.asarray(codec.code_values(jnp.asarray(codes.view(codec.codes_dtype))))
    for each in (reader, reader.computed()) if reader.levels.table else (reader,):
        got = unpacked(each, packed, dims_first)
        np.testing.assert_allclose(got, want, atol=4e-3 if codec.rotated else 0)
