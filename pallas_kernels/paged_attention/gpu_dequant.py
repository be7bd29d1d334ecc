"""How a GPU kernel reads keys or values: which words it loads, and what dot operands they become.

A reader turns a block of tokens into operands `[tokens, columns]`, each a power of two of
consecutive places in the reader's own order of dims (`dims`). Codes are unpacked in registers,
two at a time in the halves of a 32-bit register, by inline PTX; on the CPU a jnp twin computes
the same levels. A codebook is an odd polynomial of the centred code, or a table of 8 values that
PRMT looks up four at a time: all levels of 3 bits, the positive ones of a 4-bit codebook that
needs degree 9. Uniform values are the codes' own bits, read as float16 subnormals.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

if TYPE_CHECKING:  # codecs lie above the kernels: only their interface is used here
    from jaxkv.codecs.codec import TensorCodec

LEAST_COLUMNS = 16  # a dot of 16-bit types contracts at least so many
MANTISSA = 10  # bits of a float16's
# Odd polynomial of t = (code - 7.5) / 8 through the 16 Lloyd-Max levels; largest error 2.2e-4.
LLOYD_MAX_4BIT = (2.0558169, 0.4017481, 0.7171981, -0.9974933, 1.0537972)


@dataclasses.dataclass(frozen=True)
class Levels:
    """What a code stands for, before the reader's `gain`.

    `coefficients` are those of t, t^3, ..., `t = (code - centre) * step`; empty means the code
    itself, times the power of two of a subnormal's place.
    """

    bits: int
    coefficients: tuple[float, ...] = ()
    step: float = 1.0
    gain: float = 1.0
    # 8 values to look up instead: all of 3 bits, the positive half of 4 bits.
    table: tuple[float, ...] = ()

    @property
    def centre(self) -> float:
        return (2**self.bits - 1) / 2


def make_levels(codec: "TensorCodec", lookup: bool = True) -> Levels:
    """Levels of a codec with packed codes; `lookup` allows a table instead of a polynomial.

    Raises:
      NotImplementedError: a codebook that no short polynomial passes through.
    """
    codebook = getattr(codec, "levels", None)
    if codebook is None:
        return Levels(codec.bits)
    half = 2 ** (codec.bits - 1)
    all_levels = np.asarray(codebook.levels)
    step = {2: 0.25, 3: 0.125, 4: 1 / 32}[codec.bits]
    if len(codebook.polynomial) == 2:
        # b step^-3 (t^3 + c t): the factor goes into the gain, which saves a multiplication.
        a, b = codebook.polynomial
        gain = b / step**3
        table = tuple(map(float, all_levels / gain)) if lookup and codec.bits == 3 else ()
        return Levels(codec.bits, (a / step / gain, 1.0), step, gain, table)
    step = 1 / half
    if codebook.polynomial:
        scaled = [c / step ** (2 * i + 1) for i, c in enumerate(codebook.polynomial)]
        return Levels(codec.bits, tuple(scaled), step)
    if codec.bits == 4:
        table = tuple(codebook.levels[half:]) if lookup else ()
        return Levels(4, LLOYD_MAX_4BIT, step, table=table)
    if codec.bits > 4:
        raise NotImplementedError(f"codebook={codebook.name!r}, bits={codec.bits}: no polynomial.")
    t = (np.arange(half) + 0.5) * step
    powers = t[:, None] ** (2 * np.arange(half)[None] + 1)
    solved = np.linalg.solve(powers, np.asarray(codebook.levels[half:]))
    table = tuple(map(float, all_levels)) if lookup and codec.bits == 3 else ()
    return Levels(codec.bits, tuple(map(float, solved)), step, table=table)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Columns that are loaded together: `words` words, repeated with later fields to fill a dot.

    Column `c` holds word `start + c % words`; operand `j` is its field `j * step + c // words`.
    """

    start: int
    words: int
    columns: int

    @property
    def step(self) -> int:
        return self.columns // self.words


def split_columns(total: int) -> tuple[tuple[int, int], ...]:
    """`(start, size)` of the powers of two, falling, that make up `total`."""
    parts, start = [], 0
    for bit in reversed(range(total.bit_length())):
        if total >> bit & 1:
            parts.append((start, 1 << bit))
            start += 1 << bit
    return tuple(parts)


def _along(x, axis: int):
    """A vector as a matrix whose `axis` it runs along; scalars stay as they are."""
    return x if jnp.ndim(x) == 0 else x[:, None] if axis == 0 else x[None, :]


@dataclasses.dataclass(frozen=True)
class Where:
    """Where a block's tokens stand: one page and a slice, or a page and a slot a token."""

    layer: Any
    head: Any
    page: Any  # i32[] or i32[tokens]
    slot: Any  # pl.ds or i32[tokens]
    tokens: int
    place: Any  # the page's slot in the table, like page
    inside: Any = None  # bool[tokens] of those that may be read; None for all

    def load(self, ref, columns, *, dims_first: bool = False) -> jax.Array:
        """`[tokens, columns]`, or with `dims_first` the other way round; zero where not inside.

        `columns` is `pl.ds` or `i32[columns]`. What is turned is read turned: 16-bit values then
        come out of shared memory as the matrix units want them (ldmatrix), while values turned
        afterwards would be written there again.
        """
        if isinstance(columns, pl.Slice) and jnp.ndim(self.page) == 0 and not dims_first:
            at = ref.at[self.layer, self.page, self.head, self.slot, columns]
            return self._load(at, ref.dtype, (self.tokens, columns.size))
        # Slices and vectors of indices do not mix in the interpreter.
        slot = self.slot
        if jnp.ndim(self.page) == 0:
            slot = slot.start + jnp.arange(self.tokens, dtype=jnp.int32)
        if isinstance(columns, pl.Slice):
            columns = columns.start + jnp.arange(columns.size, dtype=jnp.int32)
        shape = (self.tokens, columns.shape[0])
        shape, axis = (shape[::-1], 1) if dims_first else (shape, 0)
        spread = lambda x, runs: jnp.broadcast_to(_along(x, runs), shape)
        page, slot, columns = spread(self.page, axis), spread(slot, axis), spread(columns, 1 - axis)
        at = ref.at[self.layer, page, self.head, slot, columns]
        return self._load(at, ref.dtype, shape, axis)

    def load_factor(self, ref, row: int) -> jax.Array:
        """`[tokens]`, words as stored; zero where not inside."""
        at = ref.at[self.layer, self.page, jnp.full((), row, jnp.int32), self.head, self.slot]
        return self._load(at, ref.dtype, (self.tokens,))

    def _load(self, at, dtype, shape, axis: int = 0):
        """`axis` is that of the tokens."""
        if self.inside is None:
            return plgpu.load(at)
        inside = self.inside if len(shape) == 1 else _along(self.inside, axis)
        # No arithmetic could hide a NaN of the values afterwards: 0 * NaN is NaN.
        return plgpu.load(at, mask=jnp.broadcast_to(inside, shape), other=jnp.zeros((), dtype))


def factor_value(stored: jax.Array, half: int | None = None) -> jax.Array:
    """Float32 value of a stored factor, float16 or uint8 (`ue5m3`, a float16 cut short).

    With `half`, of the low (0) or high (1) one of two in each word.
    """
    if half is not None:
        bits = 4 * stored.dtype.itemsize
        stored = (stored >> np.asarray(bits * half, stored.dtype)).astype(f"uint{bits}")
        if bits == 16:
            stored = jax.lax.bitcast_convert_type(stored, jnp.float16)
    if stored.dtype == jnp.uint8:
        bits = stored.astype(jnp.uint16) << np.uint16(7)
        stored = jax.lax.bitcast_convert_type(bits, jnp.float16)
    return stored.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class WholeReader:
    """Reads values of 8, 16 or 32 bits as they are and converts them to `dtype`."""

    head_dim: int
    dtype: str
    stored: str
    arrays: tuple[str, ...]

    @property
    def dims(self) -> tuple[np.ndarray, ...]:
        """Dims in each operand's columns."""
        return tuple(np.arange(a, a + n) for a, n in split_columns(self.head_dim))

    def gains(self, asm: bool) -> tuple[float, ...]:
        """What each operand's values are still to be multiplied by."""
        return (1.0,) * len(self.dims)

    def load(self, refs, where: Where, *, dims_first: bool = False) -> list[jax.Array]:
        """Values of each operand, `[tokens, columns]` or with `dims_first` turned."""
        columns = [pl.ds(a, n) for a, n in split_columns(self.head_dim)]
        return [where.load(refs[0], x, dims_first=dims_first) for x in columns]

    def computed(self) -> "WholeReader":
        """The same: there are no levels."""
        return self

    def load_shifts(self, ref, *, dims_first: bool = False) -> None:
        """Nothing: whole values need none."""
        del ref, dims_first

    def operands(
        self, loaded, asm: bool, shifts=None, *, dims_first: bool = False
    ) -> list[jax.Array]:
        """Shaped like what was loaded."""
        del asm, shifts, dims_first
        return [x.astype(self.dtype) for x in loaded]


@dataclasses.dataclass(frozen=True)
class PlanesReader:
    """Reads 2-, 3-, 4- or 8-bit codes in planes (`jaxkv.codecs.packing`) of 16- or 32-bit words."""

    head_dim: int
    word_bits: int
    levels: Levels
    arrays: tuple[str, ...]
    # What 8 bits are: "uint8", "int8" (a word holds code + 128), "float8_e4m3fn" or "float8_e5m2".
    bytes_are: str = "uint8"

    dtype = "float16"

    @property
    def width(self) -> int:
        """Bits of a field of the first array."""
        return 2 if self.levels.bits == 3 else self.levels.bits

    @property
    def words(self) -> int:
        return self.head_dim * self.width // self.word_bits

    @property
    def tiles(self) -> tuple[Tile, ...]:
        return tuple(Tile(a, n, max(n, LEAST_COLUMNS)) for a, n in split_columns(self.words))

    def computed(self) -> "PlanesReader":
        """The same without a table: levels come from their polynomial."""
        return dataclasses.replace(self, levels=dataclasses.replace(self.levels, table=()))

    @property
    def turns_words(self) -> bool:
        """Whether words may be read turned: where none repeats to fill a tile's columns."""
        return all(tile.step == 1 for tile in self.tiles)

    @property
    def fields(self) -> tuple[tuple[int, int], ...]:
        """`(tile, bit)` of each operand: where in its tile's words it begins."""
        per_word = self.word_bits // self.width
        return tuple(
            (i, field * self.width)
            for i, tile in enumerate(self.tiles)
            for field in range(0, per_word, tile.step)
        )

    @property
    def dims(self) -> tuple[np.ndarray, ...]:
        """Dims in each operand's columns."""
        return tuple(
            (bit // self.width + c // tile.words) * self.words + tile.start + c % tile.words
            for i, bit in self.fields
            for tile in (self.tiles[i],)
            for c in (np.arange(tile.columns),)
        )

    def gains(self, asm: bool) -> tuple[float, ...]:
        """What each operand's values are still to be multiplied by."""
        if self.bytes_are == "float8_e4m3fn" and asm and not _converts_float8():
            return (2.0**8,) * len(self.fields)
        if self.levels.coefficients or self.bytes_are != "uint8" or not asm:
            return (self.levels.gain,) * len(self.fields)
        return tuple(
            2.0 ** (24 - _place(_nibble(bit % 16, self.levels), self.levels)[1])
            for _, bit in self.fields
        )

    def load(self, refs, where: Where, *, dims_first: bool = False) -> list[tuple[jax.Array, ...]]:
        """Words of each tile, `[tokens, columns]` or with `dims_first` turned.

        A third bit's words repeat to stand beside the others'.
        """
        load = functools.partial(where.load, dims_first=dims_first and self.turns_words)
        loaded = []
        for tile in self.tiles:
            word = tile.start + _rem(jnp.arange(tile.columns, dtype=jnp.int32), tile.words)
            whole = pl.ds(tile.start, tile.columns)
            words = [load(refs[0], whole if tile.step == 1 else word)]
            if len(refs) > 1:
                # That of dim d lies in word d % n at bit d // n, n half the words of the others.
                words.append(load(refs[1], _rem(word, self.words // 2)))
            loaded.append(tuple(words))
        return loaded

    @functools.cached_property
    def shifts(self) -> np.ndarray:
        """How far right each column's words are to be shifted: `i32[tiles, parts, columns]`.

        A kernel loads it: computed from an iota, it would keep Triton from unpacking in the
        registers of the dot (only loads may be the leaves of what is moved there).
        """
        most = max(tile.columns for tile in self.tiles)
        rows = np.zeros((len(self.tiles), len(self.arrays), most), np.int32)
        for i, tile in enumerate(self.tiles):
            field, word = np.divmod(np.arange(tile.columns), tile.words)
            rows[i, 0, : tile.columns] = field * self.width
            if len(self.arrays) > 1:
                high = 2 * field + (tile.start + word) // (self.words // 2)
                rows[i, 1, : tile.columns] = high
        return rows

    def operands(
        self, loaded, asm: bool, shifts=None, *, dims_first: bool = False
    ) -> list[jax.Array]:
        """Float16 values of each operand, `[tokens, columns]` or with `dims_first` turned.

        `loaded` and `shifts` come from `load` and `load_shifts` of the same `dims_first`.
        """
        values = self._values(loaded, asm, shifts)
        # Words that repeat were loaded as they lie.
        return [x.T for x in values] if dims_first and not self.turns_words else values

    def _values(self, loaded, asm: bool, shifts) -> list[jax.Array]:
        if asm and self.levels.table and self.levels.bits == 4:
            return self._look_up(loaded)
        assert shifts is not None
        align = self._align_asm if asm else self._align
        tiles = [align(words, i, shifts[i]) for i, words in enumerate(loaded)]
        if not asm:
            return [self._unpack(tiles[i], bit) for i, bit in self.fields]
        fields = [
            (tiles[i], bit // 2 % 2 if len(tiles[i]) > 1 else 0, bit) for i, bit in self.fields
        ]
        return [
            _asm(
                self._text(bit),
                (words[odd],),
                "=r,r,r" if self.word_bits == 32 else "=r,r",
                2,
            )
            for words, odd, bit in fields
        ]

    def _text(self, bit: int) -> str:
        """PTX of one pair of the field at `bit`."""
        if self.levels.bits == 8:
            return _bytes_asm(self.word_bits, bit, self.bytes_are)
        bit = _nibble(bit, self.levels)
        if self.levels.table:
            return _lookup3_asm(self.levels.table, self.word_bits, bit // 4)
        return _planes_asm(self.levels, self.word_bits, bit)

    def _look_up(self, loaded):
        """Looks magnitudes up: a nibble of `index` is the place among the positive levels."""
        per_pair = 2 if self.word_bits == 32 else 1
        pack, signed = 32 // self.word_bits, jnp.dtype(f"int{self.word_bits}")
        index = [_asm(_INDEX_ASM, words, "=r,r", pack, signed) for words in loaded]
        constraints = ",".join(["=r", *["r"] * (2 * per_pair)])
        return [
            _asm(
                _lookup_asm(self.levels.table, self.word_bits, bit // 4),
                (index[i], *loaded[i]),
                constraints,
                2,
            )
            for i, bit in self.fields
        ]

    def load_shifts(self, ref, *, dims_first: bool = False) -> list[list[jax.Array | None]]:
        """Of each tile's parts: `i32[1, columns]`, or turned; None where nothing is shifted."""
        axis = 0 if dims_first and self.turns_words else 1
        load = lambda i, part, n: _along(ref[i, part, pl.ds(0, n)], axis)
        return [
            [
                load(i, part, tile.columns) if self.shifts[i, part].any() else None
                for part in range(len(self.arrays))
            ]
            for i, tile in enumerate(self.tiles)
        ]

    def _align(self, words, i, shifts):
        """Words of a tile, shifted."""
        return tuple(
            word if shift is None else word >> shift.astype(word.dtype)
            for word, shift in zip(words, shifts, strict=True)
        )

    def _align_asm(self, words, i, shifts: list[Any]):
        """The same by PTX; 3-bit codes are put into nibbles, even and odd fields apart."""
        shifted = tuple(part for part, shift in enumerate(shifts) if shift is not None)
        if len(words) == 1 and not shifted:
            return words
        args = (*words, *(jnp.broadcast_to(shifts[p], words[0].shape) for p in shifted))
        # Shifts are 32 bits wide: a register each, also where two 16-bit words share one.
        registers = len(words) + len(shifted) * (1 if self.word_bits == 32 else 2)
        constraints = ",".join(["=r", *["r"] * registers])
        pack = 32 // self.word_bits
        signed = jnp.dtype(f"int{self.word_bits}")  # Triton refuses unsigned results
        return tuple(
            _asm(_align_text(len(words), shifted, pack, odd), args, constraints, pack, signed)
            for odd in range(len(words))
        )

    def _unpack(self, words, bit):
        """The PTX's levels in plain JAX, each step rounded to float16."""
        mask = np.asarray(2**self.width - 1, words[0].dtype)
        code = (words[0] >> np.asarray(bit, words[0].dtype) & mask).astype(jnp.int32)
        if len(words) == 2:
            one = np.asarray(1, words[1].dtype)
            code = code + 4 * (words[1] >> np.asarray(bit, words[1].dtype) & one).astype(jnp.int32)
        if self.bytes_are.startswith("float8"):
            code = jax.lax.bitcast_convert_type(code.astype(jnp.uint8), self.bytes_are)
            return code.astype(jnp.float16)
        code = code.astype(jnp.float32)
        if not self.levels.coefficients:
            return (code - (128 if self.bytes_are == "int8" else 0)).astype(jnp.float16)
        if self.levels.table:
            index = jnp.abs(code - 7.5) - 0.5 if self.levels.bits == 4 else code
            value = jnp.zeros_like(code)
            for i, level in enumerate(self.levels.table):
                value = jnp.where(index == i, level, value)
            negative = (code < 8) & (self.levels.bits == 4)
            return jnp.where(negative, -value, value).astype(jnp.float16)
        half = lambda x: x.astype(jnp.float16).astype(jnp.float32)
        t = half((code - self.levels.centre) * self.levels.step)
        *rest, value = (float(np.float16(c)) for c in self.levels.coefficients)
        value, square = jnp.full_like(t, value), t * t
        for i, coefficient in enumerate(reversed(rest)):
            first = i == 0 and self.levels.coefficients[-1] == 1.0
            value = half((square if first else value * half(square)) + coefficient)
        return (value * t).astype(jnp.float16)


Reader = WholeReader | PlanesReader


def exact_reader(side: str, head_dim: int, dtype: jnp.dtype) -> WholeReader:
    """Reader of `ExactPages`."""
    return WholeReader(head_dim, str(jnp.dtype(dtype)), str(jnp.dtype(dtype)), (side,))


def coded_reader(side: str, codec: "TensorCodec", head_dim: int, arrays: dict) -> Reader:
    """Reader of one side of `CodedPages`, of a `TokenMajor` layout.

    Raises:
      NotImplementedError: words of 8 bits.
    """
    codes = arrays[f"{side}_codes"]
    if codec.bits not in (2, 3, 4):
        exact = codes.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        dtype = str(codes.dtype) if exact else "float16"
        if codes.dtype not in (jnp.uint16, jnp.uint32):
            # Float8 lies in pools as bytes.
            return WholeReader(head_dim, dtype, str(codec.codes_dtype), (f"{side}_codes",))
    word_bits = 8 * codes.dtype.itemsize
    if word_bits == 8:
        raise NotImplementedError(f"{word_bits=}: the GPU kernel reads words of 16 or 32 bits.")
    names = (f"{side}_codes", f"{side}_high")[: 2 if codec.bits == 3 else 1]
    # A lookup of 4 bits takes words that are 16 or more columns by themselves.
    lookup = codec.bits == 3 or head_dim * 4 // word_bits % LEAST_COLUMNS == 0
    bytes_are = str(codec.codes_dtype) if codec.bits == 8 else "uint8"
    return PlanesReader(head_dim, word_bits, make_levels(codec, lookup), names, bytes_are)


def exp2(x: jax.Array, asm: bool) -> jax.Array:
    """`2^x`, float32; by PTX without the two steps that widen its range."""
    if not asm:
        return jnp.exp2(x)
    [y] = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return y


def _rem(x, n):
    """`x % n` of what is not negative: looking after signs hides from Triton what is contiguous."""
    return jax.lax.rem(x, jnp.full_like(x, n))


def _asm(text, args, constraints, pack, dtype=jnp.float16):
    [y] = plgpu.elementwise_inline_asm(
        text,
        args=list(args),
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return y


def _place(bit: int, levels: Levels) -> tuple[int, int]:
    """Right shift (negative: left) of a field at `bit` of 16, and where it stands then.

    A field must fit into the mantissa; centred codes need a place for one half below it.
    """
    least = 1 if levels.coefficients else 0
    for shift in (0, 8, 4, -4):
        if least <= bit - shift <= MANTISSA - levels.bits:
            return shift, bit - shift
    raise AssertionError(f"{bit=}")


def _nibble(bit: int, levels: Levels) -> int:
    """Where a code stands once its bits are together: 3-bit ones are put into nibbles."""
    return bit // 4 * 4 if levels.bits == 3 else bit


@functools.cache
def _align_text(parts: int, shifted: tuple[int, ...], pack: int, odd: int) -> str:
    """PTX of one register of words; arguments: the parts, then shifts of the parts `shifted`.

    What comes over from the neighbouring word of a register is masked later.
    """
    lines = [".reg .b32 t, h, a, b;"]
    for part, name in zip(range(parts), "th", strict=False):
        lines.append(f"mov.b32 {name}, ${1 + part};")
        if part in shifted:
            first = 1 + parts + pack * shifted.index(part)
            if pack == 1:
                lines.append(f"shr.u32 {name}, {name}, ${first};")
            else:  # each half by its own amount: Triton chooses which words share a register
                lines += [f"shr.u32 a, {name}, ${first};", f"shr.u32 b, {name}, ${first + 1};"]
                lines.append(f"lop3.b32 {name}, a, b, 0x0000ffff, 0xe4;")
    if parts == 2:
        lines += _shift("t", 2) if odd else _shift("h", -2)
        lines.append("lop3.b32 t, t, h, 0x33333333, 0xe4;")  # (a & c) | (b & ~c)
    return "{\n" + "\n".join([*lines, "mov.b32 $0, t;"]) + "\n}"


@functools.cache
def _planes_asm(levels: Levels, word_bits: int, bit: int) -> str:
    """PTX of one pair of values, fields at `bit` of a pair of words."""
    shift, place = _place(bit % 16, levels)
    lines = [".reg .b32 t, s, v, a, b;"]
    if word_bits == 32:  # the halves of two words, side by side
        lines.append(f"prmt.b32 t, $1, $2, {'0x5410' if bit < 16 else '0x7632'};")
    else:
        lines.append("mov.b32 t, $1;")
    lines += _shift("t", shift)
    # lop3 table 0xea: (a & b) | c. The constant gives the exponent: 2^(10 - place) + code.
    exponent = (15 + MANTISSA - place) << MANTISSA if levels.coefficients else 0
    mask = (2**levels.bits - 1) << place
    lines.append(f"lop3.b32 t, t, {_twice(mask)}, {_twice(exponent)}, 0xea;")
    if not levels.coefficients:
        return "{\n" + "\n".join([*lines, "mov.b32 $0, t;"]) + "\n}"
    offset = -(2.0 ** (MANTISSA - place) + levels.centre) * levels.step
    lines += [
        f"mov.b32 a, {_half(levels.step)};",
        f"mov.b32 b, {_half(offset)};",
        "fma.rn.f16x2 t, t, a, b;",
    ]
    *rest, lead = levels.coefficients
    if lead == 1.0:
        lines += [f"mov.b32 a, {_half(rest[-1])};", "fma.rn.f16x2 v, t, t, a;"]
        rest = rest[:-1]
    else:
        lines.append(f"mov.b32 v, {_half(lead)};")
    if rest:
        lines.append("mul.rn.f16x2 s, t, t;")
    for coefficient in reversed(rest):
        lines += [f"mov.b32 a, {_half(coefficient)};", "fma.rn.f16x2 v, v, s, a;"]
    lines.append("mul.rn.f16x2 $0, v, t;")
    return "{\n" + "\n".join(lines) + "\n}"


# Nibbles of codes to places among 8 magnitudes: code - 8, or 7 - code below 8.
_INDEX_ASM = """{
.reg .b32 u, v;
and.b32 u, $1, 0x88888888;
shr.u32 v, u, 3;
sub.s32 u, u, v;
lop3.b32 $0, $1, u, 0x77777777, 0x82;
}"""  # ~(a ^ b) & c


@functools.cache
def _lookup_asm(magnitudes: tuple[float, ...], word_bits: int, plane: int) -> str:
    """PTX of one pair of a 4-bit table; arguments: a pair of words of indices, one of codes.

    PRMT picks four bytes of eight by nibbles: low and high bytes of two planes of both words.
    """
    half = np.asarray(magnitudes, np.float16).view(np.uint16)
    word = lambda part: "0x" + "".join(f"{int(b):02x}" for b in reversed(part))
    low, high = half & 255, half >> 8
    byte, shift = plane // 2, 12 - 4 * (plane % 4)
    if word_bits == 32:
        pick = f"prmt.b32 i, $1, $2, 0x00{4 + byte}{byte};"
        codes = f"prmt.b32 s, $3, $4, {'0x5410' if plane < 4 else '0x7632'};"
    else:
        pick = f"prmt.b32 i, $1, $1, 0x00{2 + byte}{byte};"
        codes = "mov.b32 s, $2;"
    lines = [
        ".reg .b32 i, l, h, s, a, b;",
        pick,
        f"mov.b32 a, {word(low[:4])};",
        f"mov.b32 b, {word(low[4:])};",
        "prmt.b32 l, a, b, i;",
        f"mov.b32 a, {word(high[:4])};",
        f"mov.b32 b, {word(high[4:])};",
        "prmt.b32 h, a, b, i;",
        f"prmt.b32 l, l, h, {'0x6240' if plane % 2 == 0 else '0x7351'};",
        codes,
        *([f"shl.b32 s, s, {shift};"] if shift else []),
        "lop3.b32 $0, l, s, 0x80008000, 0xd2;",  # a ^ (~b & c): codes from 8 are positive
    ]
    return "{\n" + "\n".join(lines) + "\n}"


@functools.cache
def _lookup3_asm(table: tuple[float, ...], word_bits: int, plane: int) -> str:
    """PTX of one pair of a 3-bit table; arguments: a pair of words of nibbles below 8.

    PRMT picks four bytes of eight by nibbles: low and high bytes of two planes of both words.
    """
    half = np.asarray(table, np.float16).view(np.uint16)
    word = lambda part: "0x" + "".join(f"{int(b):02x}" for b in reversed(part))
    low, high = half & 255, half >> 8
    byte = plane // 2
    if word_bits == 32:
        pick = f"prmt.b32 i, $1, $2, 0x00{4 + byte}{byte};"
    else:
        pick = f"prmt.b32 i, $1, $1, 0x00{2 + byte}{byte};"
    lines = [
        ".reg .b32 i, l, h, a, b;",
        pick,
        "and.b32 i, i, 0x7777;",
        f"mov.b32 a, {word(low[:4])};",
        f"mov.b32 b, {word(low[4:])};",
        "prmt.b32 l, a, b, i;",
        f"mov.b32 a, {word(high[:4])};",
        f"mov.b32 b, {word(high[4:])};",
        "prmt.b32 h, a, b, i;",
        f"prmt.b32 $0, l, h, {'0x6240' if plane % 2 == 0 else '0x7351'};",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


def _converts_float8() -> bool:
    """Whether the GPU's instructions include e4m3 to float16: from Ada and Hopper on."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return "." in capability and tuple(map(int, capability.split("."))) >= (8, 9)


@functools.cache
def _bytes_asm(word_bits: int, bit: int, bytes_are: str) -> str:
    """PTX of one pair of bytes, byte `bit / 8` of a pair of words, as float16.

    Unsigned bytes are subnormals, code * 2^-24; signed ones become 1024 + code + 128 first. Float8
    of 5 exponent bits is the top half of a float16; of 4, where no instruction converts it, one
    shift away and times 2^-8.
    """
    byte = bit // 8
    exponent = "0x64646464" if bytes_are == "int8" else "0x00000000"
    lines = [".reg .b32 t, e;", f"mov.b32 e, {exponent};"]
    if bytes_are == "float8_e4m3fn" and _converts_float8():
        lines += [
            ".reg .b16 low, high;",
            f"prmt.b32 t, $1, e, {'0x4420' if byte == 0 else '0x4431'};",
            "mov.b32 {low, high}, t;",
            "cvt.rn.f16x2.e4m3x2 t, low;",
        ]
    elif bytes_are.startswith("float8"):
        assert word_bits == 16, "layouts keep float8 as bytes beside 32-bit words"
        lines.append(f"prmt.b32 t, $1, e, {'0x2404' if byte == 0 else '0x3414'};")
        if bytes_are == "float8_e4m3fn":
            lines += [
                "shr.u32 e, t, 1;",
                "and.b32 e, e, 0x3f803f80;",
                "lop3.b32 t, t, 0x80008000, e, 0xea;",  # (a & b) | c
            ]
    else:
        if word_bits == 32:
            lines.append(f"prmt.b32 t, $1, $2, 0x0{4 + byte}0{byte};")
            lines.append("lop3.b32 t, t, 0x00ff00ff, e, 0xe2;")  # (a & b) | (c & ~b)
        else:
            lines.append(f"prmt.b32 t, $1, e, {'0x4240' if byte == 0 else '0x4341'};")
        if bytes_are == "int8":
            lines += [f"mov.b32 e, {_half(-1152.0)};", "add.rn.f16x2 t, t, e;"]
    return "{\n" + "\n".join([*lines, "mov.b32 $0, t;"]) + "\n}"


def _shift(name: str, right: int) -> list[str]:
    if not right:
        return []
    return [f"{'shr.u32' if right > 0 else 'shl.b32'} {name}, {name}, {abs(right)};"]


def _twice(bits: int) -> str:
    return f"0x{bits:04x}{bits:04x}"


def _half(x: float) -> str:
    value = np.float16(x)
    return _twice(int(value.view(np.uint16)))
