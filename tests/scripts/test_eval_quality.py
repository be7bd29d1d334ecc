"""scripts/eval_quality.py: its caches, its JSON, its one-line errors."""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import models
from scripts import eval_quality
from scripts.shared.keep import CodecsOptions

ROOT = Path(__file__).parents[2]


def make_args(**options) -> eval_quality.Args:
    """The arguments; options of what the cache keeps are found among them."""
    names = {field.name for field in dataclasses.fields(CodecsOptions)}
    keep = {name: options.pop(name) for name in names & options.keys()}
    return eval_quality.Args(keep=CodecsOptions(**keep), **options)


def test_sinks_beside_a_window_belong_to_the_exact_cache_too(folder):
    architecture = models.architecture_config(models.open_checkpoint(folder).config)
    for codec in ("exact", "3bit_nc"):
        for window, sinks in ((None, 0), (16, 4)):
            args = make_args(window=window, sink_tokens=4)
            layers = eval_quality.evaluated_config(architecture, codec, "float32", args).layers
            assert [spec.sink_tokens for spec in layers] == [sinks] * 3


def test_json_table_and_plot(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("Some text that is long enough for this. " * 4)
    plot = tmp_path / "plot.svg"
    args = make_args(
        model=str(folder), codec=("int8", "exact", "4bit_nc"), text=text, tokens=90, page_size=8,
        chunk=40, plot=str(plot), json=True,
    )  # fmt: skip
    assert eval_quality.main(args) == 0
    said = capsys.readouterr()
    *table, last = said.out.splitlines()
    result = json.loads(last)
    assert [row["codec"] for row in result["results"]] == ["int8", "exact", "4bit_nc"]
    for row in result["results"]:
        keys = {"codec", "bits_per_value", "kl", "kl_p99", "ppl_ratio", "top1"}
        assert set(row) == keys and all(math.isfinite(row[k]) for k in keys - {"codec"})
        assert any(line.split()[:1] == [row["codec"]] for line in table)
    assert result["results"][1]["kl"] == 0 and result["results"][1]["top1"] == 1
    assert result["tokens"] == 90 and result["page_size"] == 8
    assert result["model"] == str(folder) and result["text"] == str(text)
    assert result["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert plot.read_text().startswith("<?xml") and str(plot) in said.err.replace("\n", "")


def test_without_matplotlib_only_a_plot_that_was_asked_for_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert eval_quality.plot_path(eval_quality.PLOT) is None
    with pytest.raises(ValueError, match="needs matplotlib"):
        eval_quality.plot_path("other.png")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(codec=("5bit",)), "'5bit' is unknown; there are exact, int8"),
        (dict(codec=("tq3",), recent_pages=0), "--recent-pages 0 must be at least 1 for codec"),
        (dict(recent_pages=-1), "--recent-pages -1 must not be negative"),
        (dict(sink_tokens=-1), "--sink-tokens -1 must not be negative"),
        (dict(tokens=1), "--tokens 1 must be at least 2"),
        (dict(chunk=0), "--chunk 0 must be at least 1"),
        (dict(text=Path("/no/such/file")), "/no/such/file: No such file"),
        (dict(plot="/no/such/folder/plot.png"), "must be a file in a folder that exists"),
        (dict(plot="plot.doc"), "must end in one of"),
    ],
)  # fmt: skip
def test_bad_arguments_are_told_before_a_model_is_opened(monkeypatch, change, message):
    if "plot" in change:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(models, "open_checkpoint", None)
    with pytest.raises(ValueError, match=message):
        eval_quality.main(make_args(**change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=200), "has 90 tokens, fewer than --tokens 200"),
        (dict(tokens=2050), "trained context, 2048"),
        (dict(keep_first=2, keep_last=2), "keep_first=2, keep_last=2 must name some of 3"),
        (dict(page_size=0), "page_size=0 must be at least 1"),
        (dict(window=0), "window=0 must be at least 1"),
    ],
)
def test_what_does_not_suit_the_model_is_told_before_weights_are_read(
    monkeypatch, folder, tmp_path, change, message
):
    text = tmp_path / "text.txt"
    text.write_text("x" * 90)
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(ValueError, match=message):
        eval_quality.main(make_args(model=str(folder), text=text, plot="", **change))


def test_an_error_is_one_line_and_exit_code_2():
    script = ROOT / "scripts" / "eval_quality.py"
    done = subprocess.run(
        [sys.executable, str(script), "--codec", "5bit"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "'5bit' is unknown" in done.stderr
