"""scripts/bench/step.py: a tiny model of random weights, whole, on a CPU."""

import json

import pytest

from scripts.bench import step


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_steps(capsys, tmp_path):
    args = step.Args(
        shape="tiny",
        codec=("exact",),
        batch=(2,),
        context=40,
        steps=2,
        repeats=1,
        dtype="float32",
        out=tmp_path,
        json=True,
    )
    assert step.main(args) == 0
    [row] = last_line(capsys)["results"]
    assert json.loads((tmp_path / "step.json").read_text()) == [row]
    assert row["tokens_per_second"] == pytest.approx(2e3 / row["step_ms"])
    assert row["kv_gb"] > 0 and row["weights_gb"] > 0


def test_a_shape_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="shape 'llama9' must be one of llama3-8b"):
        step.main(step.Args(shape="llama9"))
