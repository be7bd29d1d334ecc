"""Tables of results on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

UNITS = {  # how a result's name ends, and what follows its value
    "tokens_per_second": "tokens/s",
    "seconds": "s",
    "ms": "ms",
    "us": "us",
    "gb": "GB",
    "tflops": "TFLOP/s",
}
FRACTIONS = ("spread", "outside", "overhead")


def make_table(title: str, columns: dict[str, list[str]]) -> Table:
    """A table that never cuts a cell short: names on the left, numbers on the right.

    A column whose cells are all empty, as nothing was measured, is left out.
    """
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = {name: cells for name, cells in columns.items() if any(cells) or not cells}
    for number, (name, cells) in enumerate(columns.items()):
        widest = max(map(len, [*cells, *name.split("\n")]))
        table.add_column(name, min_width=widest, justify="right" if number else "left")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def format_column(rows: list[dict], key: str, form: str, *, missing: str = "") -> list[str]:
    """One cell per row: its value of `key` by a format such as ".1f", or `missing`."""
    values = [row.get(key) for row in rows]
    return [missing if value is None else format(value, form) for value in values]


def words_of(row: dict) -> str:
    """A result in words with units: "batch 1, codec tq4, prefill 25,400 tokens/s, spread 1.2 %".

    What was not measured, and lists, are left out.
    """
    return ", ".join(
        _words(*item) for item in row.items() if isinstance(item[1], str | int | float)
    )


def _words(name: str, value: str | int | float) -> str:
    if isinstance(value, str | int):
        return f"{name.replace('_', ' ')} {value}"
    if name in FRACTIONS:
        return f"{name} {value:.1%}".replace("%", " %")
    for end, unit in UNITS.items():
        if name == end or name.endswith(f"_{end}"):
            what = name.removesuffix(end).replace("_", " ").strip()
            number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
            return f"{what} {number} {unit}".strip()
    return f"{name.replace('_', ' ')} {value:.3g}"
