"""How a kernel reads keys or values: which words it loads, and which dot operands they become.

A reader turns a block of tokens into operands `[tokens, columns]`. The number of columns is a power
of two; the operands side by side have all dims in the reader's own order (`dims`). Codes are
unpacked in registers by inline PTX (`ptx`), two at a time in the halves of a 32-bit register; in
the interpreter plain JAX computes the same levels (`levels`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.codecs.codec import TensorCodec
from pallas_kernels.device import converts_float8
from pallas_kernels.paged_attention.triton.address import Address, along
from pallas_kernels.paged_attention.triton.levels import (
    Levels,
    check_known,
    level_values,
    make_levels,
)
from pallas_kernels.paged_attention.triton.ptx import (
    INDEX_TEXT,
    align_text,
    bytes_text,
    field_place,
    inline,
    lookup_text,
    nibble,
    planes_text,
)

LEAST_COLUMNS = 16  # a dot of 16-bit types contracts at least 16 columns


@dataclasses.dataclass(frozen=True)
class Tile:
    """Columns that are loaded together: `words` words, repeated if they are too few for a dot.

    Column `c` holds word `start + c % words`; in operand `j` it becomes field
    `j * step + c // words` of that word.
    """

    start: int
    words: int
    columns: int

    @property
    def step(self) -> int:
        return self.columns // self.words


def split_columns(total: int) -> tuple[tuple[int, int], ...]:
    """Splits `total` columns into powers of two, the largest first: `(start, size)` of each."""
    parts, start = [], 0
    for bit in reversed(range(total.bit_length())):
        if total >> bit & 1:
            parts.append((start, 1 << bit))
            start += 1 << bit
    return tuple(parts)


@dataclasses.dataclass(frozen=True)
class WholeReader:
    """Reads values of 8, 16 or 32 bits as they are and converts them to `dtype`."""

    head_dim: int
    dtype: str
    stored: str
    arrays: tuple[str, ...]

    @property
    def always_finite(self) -> bool:
        """Whether no value is NaN or infinite: the codecs' 8-bit ones, which saturate."""
        return jnp.dtype(self.stored).itemsize == 1

    @property
    def dims(self) -> tuple[np.ndarray, ...]:
        """Dims in each operand's columns."""
        return tuple(np.arange(a, a + n) for a, n in split_columns(self.head_dim))

    def gains(self, asm: bool) -> tuple[float, ...]:
        """The factor that each operand's values still lack."""
        return (1.0,) * len(self.dims)

    def load(self, refs, address: Address, *, dims_first: bool = False) -> list[jax.Array]:
        """Values of each operand, `[tokens, columns]`, or `[columns, tokens]` with `dims_first`."""
        columns = [pl.ds(a, n) for a, n in split_columns(self.head_dim)]
        return [address.load(refs[0], x, dims_first=dims_first) for x in columns]

    def computed(self) -> "WholeReader":
        """Returns itself: there are no levels to look up or compute."""
        return self

    def load_shifts(self, ref, *, dims_first: bool = False) -> None:
        """Returns None: whole values are not shifted."""
        del ref, dims_first

    def operands(
        self, loaded, asm: bool, shifts=None, *, dims_first: bool = False
    ) -> list[jax.Array]:
        """Loaded values as `dtype`, shaped as they were loaded."""
        del asm, shifts, dims_first
        return [x.astype(self.dtype) for x in loaded]


@dataclasses.dataclass(frozen=True)
class PlanesReader:
    """Reads 2-, 3-, 4- or 8-bit codes in planes of 16- or 32-bit words (`layouts.packing`)."""

    head_dim: int
    word_bits: int
    levels: Levels
    arrays: tuple[str, ...]
    # Dtype of 8-bit codes: "uint8", "int8" (words hold code + 128), "float8_e4m3fn", "float8_e5m2".
    bytes_are: str = "uint8"

    dtype = "float16"
    always_finite = True

    @property
    def width(self) -> int:
        """Bits per field of the first array."""
        return 2 if self.levels.bits == 3 else self.levels.bits

    @property
    def words(self) -> int:
        return self.head_dim * self.width // self.word_bits

    @property
    def tiles(self) -> tuple[Tile, ...]:
        return tuple(Tile(a, n, max(n, LEAST_COLUMNS)) for a, n in split_columns(self.words))

    def computed(self) -> "PlanesReader":
        """The same reader without a table: it computes levels by their polynomial."""
        return dataclasses.replace(self, levels=dataclasses.replace(self.levels, table=()))

    @property
    def turns_words(self) -> bool:
        """Whether words may be loaded as `[columns, tokens]`: only if no tile repeats words."""
        return all(tile.step == 1 for tile in self.tiles)

    @property
    def fields(self) -> tuple[tuple[int, int], ...]:
        """`(tile, bit)` of each operand: its tile, and the bit of its field in the tile's words."""
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
        """The factor that each operand's values still lack."""
        if self.bytes_are == "float8_e4m3fn" and asm and not converts_float8():
            return (2.0**8,) * len(self.fields)
        if self.levels.coefficients or self.bytes_are != "uint8" or not asm:
            return (self.levels.gain,) * len(self.fields)
        return tuple(
            2.0 ** (24 - field_place(nibble(bit % 16, self.levels), self.levels)[1])
            for _, bit in self.fields
        )

    def load(
        self, refs, address: Address, *, dims_first: bool = False
    ) -> list[tuple[jax.Array, ...]]:
        """Words of each tile, `[tokens, columns]`, or with `dims_first` the other way if possible.

        For 3 bits a second array holds the words with third bits, repeated so that each is in the
        column of the word that it belongs to.
        """
        load = functools.partial(address.load, dims_first=dims_first and self.turns_words)
        loaded = []
        for tile in self.tiles:
            word = tile.start + _rem(jnp.arange(tile.columns, dtype=jnp.int32), tile.words)
            whole = pl.ds(tile.start, tile.columns)
            words = [load(refs[0], whole if tile.step == 1 else word)]
            if len(refs) > 1:
                # The third bit of dim d is bit d // n of word d % n; n is half the word count of
                # the 2-bit plane.
                words.append(load(refs[1], _rem(word, self.words // 2)))
            loaded.append(tuple(words))
        return loaded

    @functools.cached_property
    def shifts(self) -> np.ndarray:
        """How many bits each column's words are shifted right: `i32[tiles, parts, columns]`.

        The kernel loads this array. If it were computed from an iota, Triton would not unpack in
        the dot's own registers: it moves only expressions there whose leaves are loads.
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
        """Float16 values of each operand, `[tokens, columns]`, or turned with `dims_first`.

        `loaded` and `shifts` come from `load` and `load_shifts` with the same `dims_first`.
        """
        values = self._values(loaded, asm, shifts)
        # Tiles that repeat words were loaded as [tokens, columns].
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
            inline(
                self._text(bit),
                (words[odd],),
                "=r,r,r" if self.word_bits == 32 else "=r,r",
                2,
            )
            for words, odd, bit in fields
        ]

    def _text(self, bit: int) -> str:
        """PTX that computes one pair of values of the field at `bit`."""
        if self.levels.bits == 8:
            return bytes_text(self.word_bits, bit, self.bytes_are)
        bit = nibble(bit, self.levels)
        if self.levels.table:
            return lookup_text(self.levels, self.word_bits, bit // 4)
        return planes_text(self.levels, self.word_bits, bit)

    def _look_up(self, loaded):
        """Looks 4-bit codes up: a nibble of `index` is the code's index in the positive levels."""
        per_pair = 2 if self.word_bits == 32 else 1
        pack, signed = 32 // self.word_bits, jnp.dtype(f"int{self.word_bits}")
        index = [inline(INDEX_TEXT, words, "=r,r", pack, signed) for words in loaded]
        constraints = ",".join(["=r", *["r"] * (2 * per_pair)])
        return [
            inline(
                lookup_text(self.levels, self.word_bits, bit // 4),
                (index[i], *loaded[i]),
                constraints,
                2,
            )
            for i, bit in self.fields
        ]

    def load_shifts(self, ref, *, dims_first: bool = False) -> list[list[jax.Array | None]]:
        """Shifts of each tile's parts, to broadcast with words; None where nothing is shifted."""
        axis = 0 if dims_first and self.turns_words else 1
        load = lambda i, part, n: along(ref[i, part, pl.ds(0, n)], axis)
        return [
            [
                load(i, part, tile.columns) if self.shifts[i, part].any() else None
                for part in range(len(self.arrays))
            ]
            for i, tile in enumerate(self.tiles)
        ]

    def _align(self, words, i, shifts):
        """Shifts the words of a tile, in plain JAX."""
        return tuple(
            word if shift is None else word >> shift.astype(word.dtype)
            for word, shift in zip(words, shifts, strict=True)
        )

    def _align_asm(self, words, i, shifts: list[Any]):
        """Shifts words by PTX; puts 3-bit codes into nibbles, even and odd fields separately."""
        shifted = tuple(part for part, shift in enumerate(shifts) if shift is not None)
        if len(words) == 1 and not shifted:
            return words
        args = (*words, *(jnp.broadcast_to(shifts[p], words[0].shape) for p in shifted))
        # Each shift takes a register of 32 bits, even where two 16-bit words share one.
        registers = len(words) + len(shifted) * (1 if self.word_bits == 32 else 2)
        constraints = ",".join(["=r", *["r"] * registers])
        pack = 32 // self.word_bits
        signed = jnp.dtype(f"int{self.word_bits}")  # Triton refuses unsigned results
        return tuple(
            inline(align_text(len(words), shifted, pack, odd), args, constraints, pack, signed)
            for odd in range(len(words))
        )

    def _unpack(self, words, bit):
        """Levels of a field in plain JAX."""
        mask = np.asarray(2**self.width - 1, words[0].dtype)
        code = (words[0] >> np.asarray(bit, words[0].dtype) & mask).astype(jnp.int32)
        if len(words) == 2:
            one = np.asarray(1, words[1].dtype)
            code = code + 4 * (words[1] >> np.asarray(bit, words[1].dtype) & one).astype(jnp.int32)
        return level_values(self.levels, code, self.bytes_are)


Reader = WholeReader | PlanesReader


def exact_reader(side: str, head_dim: int, dtype: jnp.dtype) -> WholeReader:
    """Reader of one side of `Plain` pages."""
    return WholeReader(head_dim, str(jnp.dtype(dtype)), str(jnp.dtype(dtype)), (side,))


def coded_reader(side: str, codec: TensorCodec, head_dim: int, arrays: dict) -> Reader:
    """Reader of one side of `TokenMajor` pages.

    Raises:
      NotImplementedError: words of 8 bits, or a codec that the kernel does not know.
    """
    check_known(codec)
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
    # A 4-bit lookup does not shift words, so they must fill the columns of a dot unrepeated.
    lookup = codec.bits == 3 or head_dim * 4 // word_bits % LEAST_COLUMNS == 0
    bytes_are = str(codec.codes_dtype) if codec.bits == 8 else "uint8"
    return PlanesReader(head_dim, word_bits, make_levels(codec, lookup), names, bytes_are)


def _rem(x, n):
    """`x % n` for x >= 0, without handling of signs, which would hide from Triton contiguous x."""
    return jax.lax.rem(x, jnp.full_like(x, n))
