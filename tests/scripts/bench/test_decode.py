"""scripts/bench/decode.py: one run end to end on a CPU, shared programs, one-line errors."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import decode
from scripts.bench.cases import Case
from scripts.bench.decode import Args
from scripts.bench.problems import make_problem

ROOT = Path(__file__).parents[3]
TINY = dict(workload=("tiny",), batch=(3,), context=(200,), repeats=3)


def report_of(capsys, **options) -> tuple[int, dict]:
    """Runs the script's main; its exit code and JSON."""
    code = decode.main(Args(**TINY | options, json=True))
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_tiny_workload_runs_end_to_end(capsys, tmp_path):
    plot, out = tmp_path / "plot.png", tmp_path / "new" / "folder"
    asked = dict(codec=("tq4", "exact"), ragged=True, plot=str(plot), out=out)
    code, report = report_of(capsys, **asked)
    assert code == 0
    assert report["platform"] == "cpu" and report["backend"] == "xla"
    assert report["ceilings"]["read"] > 0 and report["ceilings"]["copy"] > 0
    assert [row["codec"] for row in report["results"]] == ["exact", "tq4"]
    for row in report["results"]:
        assert row["workload"] == "tiny" and row["by"] == "jaxkv" and row["ok"]
        assert 0 < row["error"] < 1e-4  # float32 both: any more is another result
        assert row["us"] is None and row["kernels"] is None  # no device, no device time
        assert row["wall_us_min"] <= row["wall_us"] <= row["wall_us_max"]
    assert report["results"][0]["gb"] > 3 * report["results"][1]["gb"]
    assert sum("needs a GPU" in note for note in report["notes"]) == 2
    assert plot.stat().st_size > 1000
    assert json.loads((out / "decode.json").read_text()) == report


def test_a_wrong_result_fails_the_run(capsys, monkeypatch):
    monkeypatch.setattr(decode, "MAX_ERROR", 1e-12)
    code, report = report_of(capsys, codec=("exact",), peers=False)
    assert code == 1 and not report["results"][0]["ok"]
    assert report["notes"] == []


def test_a_refused_case_is_noted_and_none_left_is_no_success(capsys):
    code, report = report_of(capsys, backend="gpu", peers=False)
    assert code == 1 and report["results"] == []
    assert all("not served" in note and "NVIDIA" in note for note in report["notes"])


def test_too_much_memory_is_noted(capsys):
    code, report = report_of(capsys, max_gib=1e-6)
    assert code == 1 and all("--max-gib" in note for note in report["notes"])


def test_cases_of_equal_sizes_share_their_programs():
    args = Args(peers=False)
    contexts = (8192, 32768, 131072)
    case = functools.partial(Case, workload="tiny", batch=5, codec="exact")
    problems = [make_problem(case(context=context)) for context in contexts]
    assert len({problem.sizes for problem in problems}) == 1
    names = [name for name, _ in decode.program_jobs(problems, args, "xla")]
    assert sorted(names) == ["attend", "data", "empty", "expected", "loop"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--workload", "llama-4"], ["llama-4", "llama-3-8b"]),
        (["--codec", "5bit"], ["5bit", "4bit_nc"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--suite", "published", "--batch", "3"], ["--suite published"]),
        (["--workload", "tiny", "--page-size", "0"], ["--page-size 0"]),
        (["--out", "/dev/null/folder"], ["--out /dev/null/folder", "Not a directory"]),
        (["--plot", "no/such/folder.png"], ["--plot", "folder that exists"]),
    ],
)
def test_bad_arguments_are_one_line(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["decode.py", *flags])
    with pytest.raises(SystemExit) as stop:
        decode.run_command(decode.main, Args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and all(word in error for word in words)


def test_it_starts_as_a_script():
    command = [sys.executable, "scripts/bench/decode.py", "--codec", "none"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "codec 'none' is unknown" in result.stderr
