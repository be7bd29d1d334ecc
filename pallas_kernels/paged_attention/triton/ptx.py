"""The text of PTX that unpacks codes in registers, two float16 values per 32-bit register.

The fields of two words are moved into the two halves of a register and become levels there by
`lop3`, `prmt` and packed float16 arithmetic. Each `*_text` function returns one inline instruction
group for `elementwise_inline_asm`; `levels.level_values` computes the same in plain JAX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.device import converts_float8
from pallas_kernels.paged_attention.triton.levels import Levels

MANTISSA = 10  # stored mantissa bits of a float16


def inline(text, args, constraints, pack, dtype=jnp.float16) -> jax.Array:
    """Applies PTX to arrays of one shape, `pack` elements at a time.

    The constraints name the output register first, then the inputs', as Triton wants them.
    """
    [y] = plgpu.elementwise_inline_asm(
        text,
        args=list(args),
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return y


def field_place(bit: int, levels: Levels) -> tuple[int, int]:
    """The right shift (left if negative) of a field at `bit` of 16 bits, and its bit afterwards.

    The field must fit into the mantissa. Centred codes need a free bit below it, for one half.
    """
    least = 1 if levels.coefficients else 0
    for shift in (0, 8, 4, -4):
        if least <= bit - shift <= MANTISSA - levels.bits:
            return shift, bit - shift
    raise AssertionError(f"{bit=}")


def nibble(bit: int, levels: Levels) -> int:
    """The bit of a code once its parts are joined: 3-bit codes are put into nibbles."""
    return bit // 4 * 4 if levels.bits == 3 else bit


@functools.cache
def align_text(parts: int, shifted: tuple[int, ...], pack: int, odd: int) -> str:
    """PTX that shifts and joins the parts of one register of words.

    Its arguments are the parts, then the shifts of the parts named in `shifted`. Bits that cross
    over from the neighbouring word of a register are masked later.
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
    return _group([*lines, "mov.b32 $0, t;"])


@functools.cache
def planes_text(levels: Levels, word_bits: int, bit: int) -> str:
    """PTX that computes one pair of levels, those of the fields at `bit` of a pair of words."""
    shift, place = field_place(bit % 16, levels)
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
        return _group([*lines, "mov.b32 $0, t;"])
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
    return _group(lines)


# Turns nibbles of 4-bit codes into indices of the 8 magnitudes: code - 8, or 7 - code below 8.
INDEX_TEXT = """{
.reg .b32 u, v;
and.b32 u, $1, 0x88888888;
shr.u32 v, u, 3;
sub.s32 u, u, v;
lop3.b32 $0, $1, u, 0x77777777, 0x82;
}"""  # ~(a ^ b) & c


@functools.cache
def lookup_text(levels: Levels, word_bits: int, plane: int) -> str:
    """PTX that looks one pair of values up in a table of 8; `plane` is the number of the nibble.

    Its arguments are a pair of words whose nibbles are indices below 8. For 3 bits these are the
    codes themselves. For 4 bits they are the result of `INDEX_TEXT`, and a pair of words of the
    codes follows, whose top bits give the signs. PRMT picks four of eight bytes by nibbles: here
    the low bytes, then the high bytes, of the levels of two planes of both words.
    """
    half = np.asarray(levels.table, np.float16).view(np.uint16)
    word = lambda part: "0x" + "".join(f"{int(b):02x}" for b in reversed(part))
    low, high = half & 255, half >> 8
    byte, signed = plane // 2, levels.bits == 4
    if word_bits == 32:
        pick = f"prmt.b32 i, $1, $2, 0x00{4 + byte}{byte};"
        signs = f"prmt.b32 s, $3, $4, {'0x5410' if plane < 4 else '0x7632'};"
    else:
        pick = f"prmt.b32 i, $1, $1, 0x00{2 + byte}{byte};"
        signs = "mov.b32 s, $2;"
    lines = [
        ".reg .b32 i, l, h, s, a, b;",
        pick,
        *([] if signed else ["and.b32 i, i, 0x7777;"]),
        f"mov.b32 a, {word(low[:4])};",
        f"mov.b32 b, {word(low[4:])};",
        "prmt.b32 l, a, b, i;",
        f"mov.b32 a, {word(high[:4])};",
        f"mov.b32 b, {word(high[4:])};",
        "prmt.b32 h, a, b, i;",
        f"prmt.b32 {'l' if signed else '$0'}, l, h, {'0x6240' if plane % 2 == 0 else '0x7351'};",
    ]
    if not signed:
        return _group(lines)
    shift = 12 - 4 * (plane % 4)
    lines += [signs, *_shift("s", -shift)]
    # a ^ (~b & c): codes of at least 8 are positive.
    return _group([*lines, "lop3.b32 $0, l, s, 0x80008000, 0xd2;"])


@functools.cache
def bytes_text(word_bits: int, bit: int, bytes_are: str) -> str:
    """PTX that converts one pair of bytes, byte `bit / 8` of a pair of words, to float16.

    Unsigned bytes are read as subnormals, code * 2^-24. Signed bytes become 1024 + code + 128, from
    which 1152 is subtracted. A float8 of 5 exponent bits (e5m2) is the top half of a float16. One
    of 4 exponent bits (e4m3), on GPUs without a conversion instruction, is shifted by one bit; the
    result is 2^-8 times the value, which `PlanesReader.gains` undoes.
    """
    byte = bit // 8
    exponent = "0x64646464" if bytes_are == "int8" else "0x00000000"
    lines = [".reg .b32 t, e;", f"mov.b32 e, {exponent};"]
    if bytes_are == "float8_e4m3fn" and converts_float8():
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
    return _group([*lines, "mov.b32 $0, t;"])


def _group(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


def _shift(name: str, right: int) -> list[str]:
    if not right:
        return []
    return [f"{'shr.u32' if right > 0 else 'shl.b32'} {name}, {name}, {abs(right)};"]


def _twice(bits: int) -> str:
    return f"0x{bits:04x}{bits:04x}"


def _half(x: float) -> str:
    value = np.float16(x)
    return _twice(int(value.view(np.uint16)))
