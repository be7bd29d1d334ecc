"""Damaged and hostile files are read, or refused in one clean line, within time and memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.text import template_limits
from tests.models.hostile.files import FAMILIES, outcome

ROOT = Path(__file__).parents[3]
COUNTS = {"config": 300, "gguf": 80, "tokenizer": 120, "safetensors": 250, "template": 200}
COUNTS["shard_index"] = 120


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_files_end_in_one_clean_line(family, tmp_path, monkeypatch):
    monkeypatch.setattr(template_limits, "MOST_STEPS", 5_000)  # loops up to the real limit are slow
    bad = {}
    for seed in range(COUNTS[family]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        if found := outcome(family, folder, seed):
            bad[seed] = found
    assert not bad


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_hostile_files_in_a_process_with_limits(family):
    command = [sys.executable, "-m", "tests.models.hostile.run", family, "100000", "1000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    ended = signal.Signals(-run.returncode).name if run.returncode < 0 else run.returncode
    assert run.returncode == 0 and lines[-1] == "end", f"{ended} after {lines[-1]}"
    assert [line for line in lines if line.startswith("bad")] == []
