"""Long work tells what it is at; results are words, and what was not measured is left out."""

import io
import time

from rich.console import Console

from scripts.bench.timing import spread, time_by_kind
from scripts.shared import progress
from scripts.shared.tables import make_table, words_of


def test_work_that_takes_long_says_what_it_is(monkeypatch):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.01)
    told = io.StringIO()
    with progress.working(Console(file=told), "compiling"):
        deadline = time.monotonic() + 5
        while told.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = told.getvalue().splitlines()
    assert len(lines) >= 2 and all(line.startswith("compiling: ") for line in lines)
    assert lines[0].endswith("s so far")


def test_short_work_leaves_no_trace():
    told = io.StringIO()
    with progress.working(Console(file=told), "compiling"):
        pass
    assert told.getvalue() == ""


def test_results_are_words_with_units():
    row = {
        "batch": 1, "codec": "tq4", "prefill_tokens_per_second": 25400.4, "seconds": 0.32251,
        "spread": 0.0123, "outside": None, "attention_ms": 12.5, "error": 0.00123, "all": [1, 2],
    }  # fmt: skip
    assert words_of(row) == (
        "batch 1, codec tq4, prefill 25,400 tokens/s, 0.323 s, spread 1.2 %, attention 12.5 ms, "
        "error 0.00123"
    )


def test_a_column_without_a_value_is_left_out():
    told = io.StringIO()
    Console(file=told).print(make_table("title", {"batch": ["1", "8"], "ms": ["", ""]}))
    assert "batch" in told.getvalue() and "ms" not in told.getvalue()


def test_what_the_profiler_did_not_see_is_no_zero():
    assert time_by_kind([]) == {}
    assert spread([0.5]) is None and spread([1.0, 1.5]) == 0.4
