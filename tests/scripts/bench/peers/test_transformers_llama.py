"""transformers_llama.py: what fits; processes that answer, fail, hang or lack a package."""

import dataclasses
import importlib.util
import time

import pytest

from scripts.bench.peers import transformers_llama as peer
from scripts.bench.peers.transformers_llama import Case, check_packages, run_case

TINY = Case(
    layers=2,
    hidden_size=96,
    intermediate_size=96,
    q_heads=6,
    kv_heads=2,
    head_dim=16,
    vocab_size=300,
    dtype="float32",
    batch=3,
    context=20,
    steps=4,
    repeats=2,
    compiled=False,
)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program in the place of the one that measures."""

    def write(text: str) -> None:
        peers = tmp_path / "scripts" / "bench" / "peers"
        peers.mkdir(parents=True)
        (peers / "transformers_llama.py").write_text(text)

    monkeypatch.setattr(peer, "ROOT", tmp_path)
    return write


def test_the_last_line_is_the_row(program):
    program('import json, sys\nprint("noise")\nprint(json.dumps([json.loads(sys.argv[1])]))')
    assert run_case(TINY, limit=60) == [dataclasses.asdict(TINY)]


def test_a_process_that_fails_is_told_by_its_code(program):
    program("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_case(TINY, limit=60)


def test_a_process_that_hangs_is_killed_with_its_children(program, tmp_path):
    program(
        "import subprocess, sys, time\n"
        'late = \'import time; time.sleep(2); open("late", "w")\'\n'
        "subprocess.Popen([sys.executable, '-c', late])\n"
        "open('started', 'w')\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(RuntimeError, match="not ready after 1 s"):
        run_case(TINY, limit=1)
    time.sleep(2)
    assert (tmp_path / "started").exists() and not (tmp_path / "late").exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(peer, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(ValueError, match="--peers needs the package no_such_package"):
        check_packages()


@pytest.mark.parametrize("batch, fits", [(1, True), (8, True), (64, False)])
def test_what_fits_an_80_gb_card(batch, fits):
    llama3_8b = Case(
        layers=32, hidden_size=4096, intermediate_size=14336, q_heads=32, kv_heads=8, head_dim=128,
        vocab_size=128_256, dtype="bfloat16", batch=batch, context=8192, steps=32, repeats=3,
        compiled=False,
    )  # fmt: skip
    assert (llama3_8b.bytes < 76 * 2**30) == fits
    assert llama3_8b.bytes > 2 * 8.03e9  # the published number of parameters


@pytest.mark.skipif(not all(map(importlib.util.find_spec, peer.PACKAGES)), reason="no transformers")
def test_transformers_decodes():
    row = run_case(TINY, limit=120)
    assert (row["batch"], row["codec"]) == (3, "transformers eager")
    assert row["step_ms"] == pytest.approx(1e3 * 3 / row["tokens_per_second"])
