"""scripts/eval_quality.py: its caches, its JSON, its one-line errors."""

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
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


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    """Two files of one name."""
    paths = [tmp_path_factory.mktemp("texts") / "text.txt" for _ in range(2)]
    paths[0].write_text("Some text that is long enough for this. " * 14)
    paths[1].write_text("Another one, with other words in it, and as long as that. " * 10)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def measured(folder, texts, tmp_path_factory):
    """The answer, the printed lines and the plot of a run over all that can be repeated."""
    pytest.importorskip("matplotlib")
    other = shutil.copytree(folder, tmp_path_factory.mktemp("models") / "other")
    plot = tmp_path_factory.mktemp("plots") / "plot.svg"
    args = make_args(
        model=(str(folder), str(other)), codec=("int8", "tq3"), text=tuple(texts),
        tasks=("needle", "pairs"), lengths=(128, 512), documents=1, instances=2, page_size=8,
        chunk=128, plot=str(plot), json=True,
    )  # fmt: skip
    said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        with pytest.raises(ValueError, match="--lengths 128 is too short for task 'pairs'"):
            eval_quality.main(args)
        args = dataclasses.replace(args, lengths=(512, 520))
        assert eval_quality.main(args) == 0
    *table, last = said[0].getvalue().splitlines()
    return json.loads(last), table, plot, args


def test_every_model_text_task_and_length_has_its_rows(measured):
    answer, table, plot, args = measured
    found = [
        (r["model"], r["kind"], r["source"], r["length"], r["codec"]) for r in answer["results"]
    ]
    sources = [("text", text) for text in args.text] + [("task", task) for task in args.tasks]
    assert found == [
        (model, kind, source, length, codec)
        for model in args.model
        for kind, source in sources
        for length in args.lengths
        for codec in ("exact", "int8", "tq3")
    ]
    lines = ["  ".join(line.split()) for line in table]
    for model, _, source, length, codec in found:
        assert any(f"{model}  {source}  {length}  {codec}  " in line for line in lines)
    assert plot.read_text().startswith("<?xml")


def test_a_row_says_what_the_cache_holds_and_what_that_costs(measured):
    answer, *_ = measured
    for row in answer["results"]:
        for key, value in row.items():
            alone = row["kind"] == "text" and key.endswith("_se")  # one document: no error bar
            unknown = alone or (row["kind"] == "text" and key == "chance")
            assert (value is None) == unknown, key
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["top1"] <= 1 and row["kl"] >= 0
        if row["codec"] == "exact":
            assert row["kl"] == row["accuracy_change"] == 0 and row["top1"] == row["ppl_ratio"] == 1
            assert row["bits_per_value"] == row["coded_bits_per_value"] == 32
        else:
            assert row["kl"] > 0
            assert row["coded_bits_per_value"] <= row["bits_per_value"] < 32
            # tq3 keeps pages exact, and a whole number of pages holds each of these lengths
            kept = row["bits_per_value"] - row["coded_bits_per_value"]
            assert kept > 0.5 if row["codec"] == "tq3" else kept == pytest.approx(0)


def test_the_answer_says_what_was_measured(measured, texts):
    answer, *_ = measured
    assert answer["page_size"] == 8 and answer["dtype"] == "float32"
    for text in texts:
        assert (
            answer["texts"][text]["sha256"] == hashlib.sha256(Path(text).read_bytes()).hexdigest()
        )
    assert answer["recent_pages"] == {"int8": 0, "tq3": 2}


def test_json_is_alone_on_stdout(folder, texts):
    script = ROOT / "scripts" / "eval_quality.py"
    options = f"--model {folder} --text {texts[0]} --codec int8 --lengths 16 --chunk 16 --json"
    done = subprocess.run(
        [sys.executable, str(script), *options.split(), "--documents", "2", "--plot", "none"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [row["codec"] for row in json.loads(done.stdout)["results"]] == ["exact", "int8"]
    assert "int8" in done.stderr and "±" in done.stderr


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
        (dict(lengths=(512, 1)), "--lengths 1 must be at least 2"),
        (dict(lengths=()), "--lengths needs a value"),
        (dict(chunk=0), "--chunk 0 must be at least 1"),
        (dict(documents=0), "--documents 0 must be at least 1"),
        (dict(instances=0), "--instances 0 must be at least 1"),
        (dict(tasks=("pairs", "chess")), "--tasks 'chess' must be one of needle, pairs, hops, all"),
        (dict(text=("python", "/no/such/file")), "/no/such/file: No such file"),
        (dict(text=("python", "python")), "--text python is given twice"),
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
        (dict(lengths=(30,)), "has 90 tokens, fewer than --documents 4 of --lengths 30 take"),
        (
            dict(lengths=(16, 2050)),
            "--lengths 2050 must be at most the model's trained context, 2048",
        ),
        (
            dict(tasks=("needle",), lengths=(40,), documents=1),
            "too short for task 'needle', which takes",
        ),
        (dict(model=("FOLDER", "/no/such/model")), "/no/such/model: no such file or folder"),
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
    options = dict(model=("FOLDER",), text=(str(text),), lengths=(16,), plot="") | change
    options["model"] = tuple(name.replace("FOLDER", str(folder)) for name in options["model"])
    with pytest.raises(ValueError, match=message):
        eval_quality.main(make_args(**options))


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
