"""scripts/bench/decode.py: cases laid out right, one run end to end on a CPU, one-line errors."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.codecs import codec_names
from scripts.bench import decode, problems, timing
from scripts.bench.decode import Args
from scripts.bench.peers import kernels as kernel_peers
from scripts.bench.problems import Case, make_problem

ROOT = Path(__file__).parents[3]
TINY = dict(workload=("tiny",), batch=(3,), context=(200,), repeats=3)


def report_of(capsys, **options) -> tuple[int, dict]:
    """Runs the script's main; its exit code and JSON."""
    code = decode.main(Args(**TINY | options, json=True))
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_tiny_workload_runs_end_to_end(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    plot = tmp_path / "plot.png"
    code, report = report_of(capsys, codec=("tq4", "exact"), ragged=True, plot=str(plot))
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
    assert json.loads((tmp_path / "bench_decode.json").read_text()) == report


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


def case(**options) -> Case:
    return Case(**dict(workload="tiny", batch=5, context=1000, codec="exact") | options)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("workload", ["tiny", "smollm2"])
def test_every_live_page_has_its_own_place(workload, ragged):
    problem = make_problem(case(workload=workload, ragged=ragged), page_size=16)
    window = problems.WORKLOADS[workload].window or 10**9
    if not ragged:
        assert set(problem.lengths) == {1000}
    else:
        assert len(set(problem.lengths)) > 1
        assert problem.lengths.min() >= 125 and problem.lengths.max() <= 1375
    pages, tokens = [], 0
    for row, length in zip(problem.table, problem.lengths, strict=True):
        seen = range(max(0, length - window), length)
        pages += [row[page % len(row)] for page in {j // 16 for j in seen}]
        tokens += len(seen)
    assert len(set(pages)) == len(pages) and 0 not in pages
    assert max(pages) < problem.sizes.pages
    shape = problem.sizes.workload
    assert problem.read_bytes == tokens * 2 * shape.kv_heads * shape.head_dim * 2


def test_spans_hold_the_window_within_the_ring():
    problem = make_problem(case(), page_size=16)
    for lengths in (problem.lengths, problem.random_lengths()):
        spans = {name: np.asarray(x) for name, x in problem.spans(lengths).items()}
        assert (spans["kv_stop"] == lengths).all() and (spans["q_start"] == lengths - 1).all()
        assert (spans["kv_start"] <= np.maximum(lengths - 80, 0)).all()
        pages = -(-lengths // 16) - spans["kv_start"] // 16
        assert (pages <= problem.sizes.width).all()
    assert (problem.random_lengths() <= problem.lengths).all()


def test_cases_of_equal_sizes_share_their_programs():
    args = Args(peers=False)
    contexts = (8192, 32768, 131072)
    problems = [make_problem(case(context=context)) for context in contexts]
    assert len({problem.sizes for problem in problems}) == 1
    names = [name for name, _ in decode.program_jobs(problems, args, "xla")]
    assert sorted(names) == ["attend", "data", "empty", "expected", "loop"]


def test_device_time_is_the_median_call_of_the_ops_own_kernels(monkeypatch):
    own = [("paged_attention_decode", 10.0), ("paged_attention_combine", 1.0)]
    calls = [[("fusion", 2.0), *own], [("fusion", 2.0), *own], [("fusion", 4.0), own[0], own[0]]]
    kernels = [(i, *kernel) for i, kernel in enumerate(sum(calls, []))]
    monkeypatch.setattr(timing, "device_kernels", lambda calls: kernels)
    found = timing.device_time([lambda: None] * 3)
    assert found is not None
    assert (found.us, found.us_min, found.us_max, found.all_us) == (11, 11, 20, 13)
    assert found.kernels == {
        "fusion": 2.67,
        "paged_attention_decode": 13.33,
        "paged_attention_combine": 0.67,
    }
    monkeypatch.setattr(timing, "device_kernels", lambda calls: [])
    assert timing.device_time([lambda: None]) is None


@pytest.mark.parametrize("window", [None, 50])
def test_keys_without_pages_attend_as_the_pages_do(window, monkeypatch):
    shape = problems.Workload(q_heads=4, kv_heads=2, head_dim=64, window=window)
    monkeypatch.setitem(problems.WORKLOADS, "tiny", shape)
    problem = make_problem(case(context=200, batch=2), page_size=16)
    data = problems.make_data(problem.sizes, jax.random.key(0))
    spans = problem.spans(problem.lengths)
    want = problems.expected(problem.sizes, data, jnp.asarray(problem.table), spans, 1)
    k, v = kernel_peers.contiguous_keys(problem, data.pages, 1)
    assert k.shape == (2, 2, window or 200, 64)
    q = data.q.reshape(2, 2, 2, 64).astype(jnp.float32) / 8
    p = jax.nn.softmax(jnp.einsum("bhgd,bhkd->bhgk", q, k.astype(jnp.float32)))
    out = jnp.einsum("bhgk,bhkd->bhgd", p, v.astype(jnp.float32)).reshape(want.shape)
    assert problems.relative_error(out, want) < 1e-5
    assert problems.relative_error(out * jnp.nan, want) == float("inf")


def test_the_issues_suite_names_known_things():
    suite = decode.issue_suite()
    assert len(set(suite)) == len(suite)
    assert {one.workload for one in suite} <= set(problems.WORKLOADS)
    assert {one.codec for one in suite} <= set(codec_names())
    pools = [one for one in suite if one.layers]
    for one in pools:  # the largest array of each
        problem = make_problem(one)
        assert problem.sizes.layers * problem.sizes.layer_bytes > 2 * 2**32


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--workload", "llama-4"], ["llama-4", "llama-3-8b"]),
        (["--codec", "5bit"], ["5bit", "4bit_nc"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--suite", "issue", "--batch", "3"], ["--suite issue"]),
        (["--workload", "tiny", "--page-size", "0"], ["--page-size 0"]),
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
    command = [sys.executable, "-m", "scripts.bench.decode", "--codec", "none"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "codec 'none' is unknown" in result.stderr
