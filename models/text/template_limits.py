"""How much a chat template may compute: steps, seconds, and the size of every value it makes.

Jinja's sandbox keeps a template away from the machine, but not from its time and memory. Here a
`Meter` counts what a rendering does, and sizes are worked out before strings are multiplied.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MOST_SOURCE = 1 << 18  # characters of a template; published ones have up to 20,000
MOST_STEPS = 500_000  # turns of loops, calls, filters, operators; published: about 20 a message
MOST_SECONDS = 10.0
MOST_CHARACTERS = 8 << 20  # of one value; a prompt of a million tokens has about 5 million
MOST_WRITTEN = 4 * MOST_CHARACTERS  # macros write what their callers write again
MOST_ITEMS = 300_000  # of one list or dict, those of its items included
MOST_DEPTH = 100
MOST_BITS = 4096  # of a whole number
MOST_SLOW = 100_000  # characters that filters take whose time grows faster than their input
SLOW_FILTERS = ("pprint", "urlize", "striptags", "xmlattr", "wordwrap")


class TemplateLimitError(ValueError):
    """A template goes beyond a limit."""


class Meter:
    """Counts what one rendering does; every method raises `TemplateLimitError` beyond a limit."""

    def __init__(self):
        self.steps, self.written = 0, 0
        self.start = time.perf_counter()

    def step(self) -> None:
        """Counts a step."""
        self.steps += 1
        if self.steps > MOST_STEPS or time.perf_counter() - self.start > MOST_SECONDS:
            raise TemplateLimitError(f"must stay within {MOST_STEPS:,} steps, {MOST_SECONDS} s")

    def write(self, text: str) -> None:
        """Counts text that is written out, or into a variable or a macro's result."""
        self.written += len(text)
        _limit(self.written, MOST_WRITTEN, "characters of output")

    def counted(self, items: Any):
        """The items, each a step."""
        for item in items:
            self.step()
            yield item

    def checked(self, value: Any) -> Any:
        """`value`, which must not be too large."""
        measure(value)
        return value

    def operator(self, symbol: str, left: Any, right: Any) -> None:
        """Counts a binary operator, whose result must not become too large."""
        self.step()
        if symbol == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, Sequence):
                    _limit(measure(value)[0] * times, MOST_CHARACTERS, "characters or items")
        elif symbol == "**" and isinstance(left, int) and isinstance(right, int):
            _limit(left.bit_length() * right, MOST_BITS, "bits")
        elif symbol == "%" and isinstance(left, str):
            _limit(_formatted(left, "%", right), MOST_CHARACTERS, "characters")

    def call(self, name: str, value: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Counts a call of a filter, or of a method of Python's, on `value`."""
        self.step()
        if name in SLOW_FILTERS:
            _limit(measure(value)[0], MOST_SLOW, f"characters for {name!r}")
        if name in _GROWTH:
            given = [*args, *named.values()]
            _limit(_GROWTH[name](value, given), MOST_CHARACTERS, "characters or items")


def measure(value: Any) -> tuple[int, int, int]:
    """Characters and items, items alone, and depth of a value; TemplateLimitError beyond a limit.

    A list that holds another one twice counts it twice, as its text would.
    """
    characters, items, deepest = 0, 0, 0
    rest = [(value, 0)]
    while rest:
        value, depth = rest.pop()
        items += 1
        if isinstance(value, str | bytes):
            characters += len(value)
        elif isinstance(value, int):
            _limit(value.bit_length(), MOST_BITS, "bits")
        elif isinstance(value, list | tuple | dict | set | frozenset):
            _limit(items + len(rest) + len(value), MOST_ITEMS, "items")
            deepest = max(deepest, depth + 1)
            _limit(deepest, MOST_DEPTH, "levels")
            parts = value.items() if isinstance(value, dict) else value
            rest += [(part, depth + 1) for part in parts]
    _limit(characters, MOST_CHARACTERS, "characters")
    return characters + items, items, deepest


def _limit(found: float, most: float, what: str) -> None:
    if found > most:
        raise TemplateLimitError(f"must stay within {most:,} {what}")


def _largest(given: Sequence[Any]) -> int:
    """The largest whole number, or length of a string, of some arguments."""
    sizes = [abs(v) for v in given if isinstance(v, int)]
    return max([*sizes, *(len(v) for v in given if isinstance(v, str))], default=0)


def _padded(value: Any, given: Sequence[Any]) -> int:
    return _largest(given)


def _formatted(form: Any, mark: str, given: Any) -> int:
    """At most this many characters come out of a format: each field can repeat every argument."""
    form = str(form)
    widths = [int(digits[:20]) for digits in re.findall(r"\d+", form)]
    values = list(given) if isinstance(given, list | tuple) else [given]
    widest = max([*widths, _largest(values)], default=0)
    return len(form) + form.count(mark) * (widest + measure(values)[0])


def _joined(value: Any, given: Sequence[Any]) -> int:
    """`value` are the parts and the first argument is put between, or the other way round."""
    between = len(given[0]) if given and isinstance(given[0], str) else 0
    if isinstance(value, str) and given:  # the method: ", ".join(parts)
        value, between = given[0], len(value)
    count = len(value) if isinstance(value, Sequence | Mapping) else MOST_ITEMS
    return between * count


def _replaced(value: Any, given: Sequence[Any]) -> int:
    if len(given) < 2 or not all(isinstance(part, str) for part in given[:2]):
        return 0  # fails by itself
    return str(value).count(given[0]) * len(given[1])


def _dumped(value: Any, given: Sequence[Any]) -> int:
    _, items, depth = measure(value)
    return items * depth * _largest(given)


_GROWTH: dict[str, Callable[[Any, Sequence[Any]], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice"), _padded),
    **dict.fromkeys(("round", "truncate"), _padded),
    "expandtabs": lambda value, given: str(value).count("\t") * (_largest(given) or 8),
    "indent": lambda value, given: (str(value).count("\n") + 1) * (_largest(given) or 4),
    "format": lambda value, given: _formatted(value, "{" if "{" in str(value) else "%", given),
    "format_map": lambda value, given: _formatted(value, "{", given),
    "translate": lambda value, given: len(str(value)) * measure(list(given))[0],
    "join": _joined,
    "replace": _replaced,
    "tojson": _dumped,
}
