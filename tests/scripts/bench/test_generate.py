"""scripts/bench/generate.py: our own speed on a tiny checkpoint, without peers."""

import json
from pathlib import Path

import pytest

from scripts.bench import generate

ORACLE = Path(__file__).parents[2] / "oracles" / "llama"


def test_our_speed(capsys):
    args = generate.Args(
        model=str(ORACLE), batch=(2,), prompt_tokens=9, new_tokens=4, repeats=2, peers=False,
        json=True,
    )  # fmt: skip
    assert generate.main(args) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    [row] = report["results"]
    assert (row["contender"], row["batch"], row["same_tokens"]) == ("jaxkv", 2, 1)
    assert row["prefill"] > 0 and row["decode"] > 0 and report["floor_ms"] > 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="--new-tokens 1 must be at least 2"):
        generate.main(generate.Args(new_tokens=1))
