"""Damages files: JSON documents part by part, bytes, GGUF headers, and makes up chat templates."""

import copy
import json
import random
import struct

HUGE = "\ue000huge\ue000"  # stands for a number that Python's json would not write
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63,
    2**64,
    10**12,
    10**39,
    10**400,
)
FLOATS = (0.5, -1.5, 1e-45, 1e-300, 1e38, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    *(
        "",
        "x",
        "a\nb",
        "\x1b[31mred\x1b[0m\r",
        "\u202etxt",
        "\ud800",
        "\0",
        "é▁",
        "../x",
        "/etc/passwd",
    ),
    *("..", "x" * 300, "y" * 200_000, "(a|a)*b", "(a*)*$", "[", "\\", "First", "sliding_attention"),
    *("yarn", "llama3", "linear", "silu", "mxfp4", "llama", "gemma3", "1" * 50),
)


def hostile_value(rng: random.Random):
    """Any value that a JSON document can hold, with a bias for those that hurt."""
    return rng.choice(
        [
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(FLOATS),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice((None, True, False, HUGE)),
            lambda: rng.choice(([], {}, [[]], [1, "a", None], {"a": {}}, {"Regex": "(a*)*b"})),
            lambda: [rng.choice(NUMBERS)] * rng.choice((1, 3, 70, 5000)),
            lambda: nested(rng.choice((3, 50, 400, 3000))),
        ]
    )()


def nested(depth: int):
    """Lists within lists."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def damaged_json(document: dict, rng: random.Random) -> bytes:
    """The document with one to three places replaced, removed or added; at times bytes, too."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _damage(document, rng)
    try:
        text = json.dumps(document, ensure_ascii=rng.random() < 0.7)
    except RecursionError:  # deeper than the writer goes
        text = "[" * 5000 + "]" * 5000
    text = text.replace(f'"{HUGE}"', "9" * 5000).replace(json.dumps(HUGE), "9" * 5000)
    data = text.encode("utf-8", "surrogatepass")
    return damaged_bytes(data, rng) if rng.random() < 0.15 else data


def _damage(document, rng: random.Random) -> None:
    place = document
    while True:  # down to a random depth
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.75:
            place = place[key]
            continue
        break
    kind = rng.random()
    if kind < 0.7:
        place[key] = hostile_value(rng)
    elif kind < 0.8:
        del place[key]
    elif kind < 0.9 and isinstance(place, dict):
        place[rng.choice((*TEXTS[:9], *place))] = place[key]
    elif isinstance(place, list):
        place += [place[key]] * rng.choice((1, 2, 1000))


def damaged_bytes(data: bytes, rng: random.Random, reach: int | None = None) -> bytes:
    """`data` with bytes changed, cut out, put in or repeated, within the first `reach`."""
    data, reach = bytearray(data), min(reach or len(data), len(data))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(max(reach, 1))
        size = rng.choice((1, 1, 4, 8, 100))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = rng.randbytes(size)
        elif kind == 4:
            form = rng.choice(("<I", "<Q"))
            number = rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(form))
            data[at : at + struct.calcsize(form)] = struct.pack(form, number)
        else:
            del data[at if rng.random() < 0.3 else rng.randrange(len(data) + 1) :]
    return bytes(data)


_FORMS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
}
_FORMS[12] = "<d"


def gguf_bytes(fields: dict, tensors: dict, alignment: int = 32) -> bytes:
    """A GGUF file of version 3: `{key: (type, value)}`, `{name: (dims, type, offset, data)}`."""
    string = lambda text: struct.pack("<Q", len(raw := _raw(text))) + raw

    def pack(kind, value):
        if kind == 8:
            return string(value)
        if kind == 9:
            item, values = value
            return struct.pack("<IQ", item, len(values)) + b"".join(pack(item, v) for v in values)
        return struct.pack(_FORMS.get(kind, "<I"), value)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, (kind, value) in fields.items():
        head += string(key) + struct.pack("<I", kind) + pack(kind, value)
    for name, (dims, kind, offset, _) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", kind, offset)
    body = b"".join(data + bytes(-len(data) % alignment) for *_, data in tensors.values())
    return head + bytes(-len(head) % alignment) + body


def _raw(text) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


def damaged_gguf(fields: dict, tensors: dict, rng: random.Random) -> bytes:
    """A file with some metadata or rows of the tensor table replaced; at times bytes, too."""
    fields, tensors = dict(fields), dict(tensors)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        if rng.random() < 0.7:
            key = rng.choice(list(fields))
            fields[key] = _gguf_value(fields[key], rng)
            if rng.random() < 0.2:
                del fields[key]
        else:
            name = rng.choice(list(tensors))
            dims, kind, offset, data = tensors.pop(name)
            number = rng.choice([n for n in NUMBERS if 0 <= n < 2**64])
            change = rng.randrange(5)
            dims = [(*dims, number), dims[::-1], (number,), dims * 9, dims][change]
            kind = rng.choice((kind, 0, 1, 2, 8, 30, number % 2**32))
            offset = rng.choice((offset, number, offset + 32))
            name = rng.choice((name, rng.choice(TEXTS)))
            tensors[name] = (dims, kind, offset, data)
    data = gguf_bytes(fields, tensors)
    return damaged_bytes(data, rng, reach=len(data) - 500) if rng.random() < 0.4 else data


def _gguf_value(old: tuple, rng: random.Random) -> tuple:
    kind = rng.choice((*_FORMS, 8, 9, old[0], old[0], 77))
    if kind == 8:
        return kind, rng.choice(TEXTS)
    if kind == 9:
        item = rng.choice((0, 4, 5, 6, 7, 8, 9, 77))
        if item == 9:
            return 9, (9, [(4, [1])] * 3)
        return 9, (item, [_gguf_scalar(item, rng)] * rng.choice((0, 1, 3, 2000)))
    return kind, _gguf_scalar(kind, rng)


def _gguf_scalar(kind: int, rng: random.Random):
    if kind == 8:
        return rng.choice(TEXTS)
    if kind == 7:
        return rng.random() < 0.5
    if kind == 6:  # the largest float64 numbers are none of float32
        return rng.choice([x for x in FLOATS if not 1e39 < abs(x) < float("inf")])
    if kind == 12:
        return rng.choice(FLOATS)
    form = _FORMS.get(kind, "<I")
    bits, signed = 8 * struct.calcsize(form), form[1].islower()
    number = rng.choice(NUMBERS) % 2**bits
    return number - 2**bits if signed and number >= 2 ** (bits - 1) else number


def made_up_template(rng: random.Random) -> str:
    """A chat template of random loops, variables, macros, filters and operators, mostly valid."""
    lines = ["{% set box = namespace(x='ab', y=[1], n=2) %}"]
    return "".join(lines + [_statement(rng, 3) for _ in range(rng.randint(1, 5))])


def _statement(rng: random.Random, depth: int) -> str:
    value = _expression(rng, 3)
    if depth == 0 or (kind := rng.randrange(8)) == 0:
        return "{{ " + value + " }}"
    body = "".join(_statement(rng, depth - 1) for _ in range(rng.randint(1, 2)))
    target = rng.choice(("box.x", "box.y", "box.n"))
    return (
        "{% set " + target + " = " + value + " %}",
        "{% for i in range("
        + rng.choice(("9", "60", "9999", "99999"))
        + ") %}"
        + body
        + "{% endfor %}",
        "{% for i in " + value + " %}" + body + "{% endfor %}",
        "{% if " + value + " %}" + body + "{% else %}x{% endif %}",
        "{% macro f(a=1) %}" + body + "{{ f(a) if box.n }}{% endmacro %}{{ f() }}{{ f(2) }}",
        "{% set z %}{{ box.x }}{{ box.x }}" + body + "{% endset %}{% set box.x = z %}",
        "{% filter upper %}" + body + "{% endfilter %}",
    )[kind - 1]


_NAMES = ("box.x", "box.y", "box.n", "messages", "messages[0].content", "i", "none", "z", "tools")
_ATOMS = ("'ab'", "'%s{}{:9}\\n\\t'", "7", "1000000", "10**9", "[1, 2]", "{'a': 1}", "1.5", "true")
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or")
_METHODS = (
    *("center", "ljust", "zfill", "replace", "join", "format", "split", "expandtabs", "upper"),
    *("items", "keys", "encode", "translate", "__class__", "append", "format_map", "count", "mro"),
)
_FILTERS = (
    *(
        "center",
        "replace",
        "join",
        "format",
        "list",
        "length",
        "tojson",
        "indent",
        "batch",
        "slice",
    ),
    *(
        "map",
        "upper",
        "sort",
        "sum",
        "string",
        "int",
        "round",
        "trim",
        "dictsort",
        "unique",
        "pprint",
    ),
    *("wordwrap", "attr", "first", "random", "reverse", "urlize", "truncate", "xmlattr", "groupby"),
)


def _expression(rng: random.Random, depth: int) -> str:
    if depth == 0:
        return rng.choice((*_NAMES, *_ATOMS))
    one = lambda: _expression(rng, rng.randrange(depth))
    arguments = ", ".join(one() for _ in range(rng.randrange(3)))
    return rng.choice(
        (
            lambda: f"({one()} {rng.choice(_OPERATORS)} {one()})",
            lambda: f"({one()}).{rng.choice(_METHODS)}({arguments})",
            lambda: f"({one()}) | {rng.choice(_FILTERS)}({arguments})",
            lambda: f"[{one()}, {one()}]",
            lambda: f"dict(a={one()}, b={one()})",
            lambda: f"({one()})[{one()}]",
            lambda: f"({one()} if {one()} else {one()})",
            one,
        )
    )()
