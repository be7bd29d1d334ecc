"""Tables of `eval_quality.py`'s results: one of texts, one of tasks."""

import functools

from rich.table import Table

from scripts.shared.tables import format_column, make_table

NOTE = "bits per value: what the cache holds at this length, exact pages counted; ± standard error"


def quality_tables(rows: list[dict], title: str) -> list[Table]:
    """The tables that have rows, in the rows' order; several models are named in a column."""
    tables = []
    for kind, columns in (("text", _text_columns), ("task", _task_columns)):
        own = [row for row in rows if row["kind"] == kind]
        if own:
            names = dict.fromkeys(row["model"] for row in rows)
            shown = _shared_columns(own, kind, several=len(names) > 1)
            about = f"{', '.join(names)}, {title}, {_counts(own, kind)}"
            table = make_table(about, {**shown, **columns(own)})
            table.caption = NOTE
            tables.append(table)
    return tables


def _counts(rows: list[dict], kind: str) -> str:
    noun = "documents per text" if kind == "text" else "instances per task"
    return f"{rows[0]['documents']} {noun} and length"


def _shared_columns(rows: list[dict], kind: str, *, several: bool) -> dict[str, list[str]]:
    column = functools.partial(format_column, rows)
    models = {"model": column("model", "")} if several else {}
    return {
        **models,
        kind: column("source", ""),
        "length": column("length", ","),
        "codec": column("codec", ""),
        "bits per\nvalue": column("bits_per_value", ".2f"),
        "of its\ncodes": [
            "" if row["codec"] == "exact" else f"{row['coded_bits_per_value']:.2f}" for row in rows
        ],
    }


def _text_columns(rows: list[dict]) -> dict[str, list[str]]:
    return {
        "KL": _with_error(rows, "kl", ".5f"),
        "KL\np99": format_column(rows, "kl_p99", ".4f"),
        "PPL\nratio": _with_error(rows, "ppl_ratio", ".4f"),
        "top-1": _with_error(rows, "top1", ".4f"),
    }


def _task_columns(rows: list[dict]) -> dict[str, list[str]]:
    return {
        "accuracy": _with_error(rows, "accuracy", ".3f"),
        "change to\nexact": _with_error(rows, "accuracy_change", "+.3f"),
        "by\nchance": format_column(rows, "chance", ".3f"),
        "KL of\nanswers": _with_error(rows, "kl", ".5f"),
    }


def _with_error(rows: list[dict], key: str, form: str) -> list[str]:
    """A value and its standard error, if it has one: "0.987 ±0.004"."""
    error = form.removeprefix("+")
    return [
        format(row[key], form)
        + ("" if row[f"{key}_se"] is None else f" ±{row[f'{key}_se']:{error}}")
        for row in rows
    ]
