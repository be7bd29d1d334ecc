"""Tables of results on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table


def make_table(title: str, columns: dict[str, list[str]]) -> Table:
    """A table that never cuts a cell short: names on the left, numbers on the right."""
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
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
