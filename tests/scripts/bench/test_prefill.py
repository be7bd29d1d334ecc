"""scripts/bench/prefill.py: a tiny model of random weights, whole, on a CPU."""

import json

import pytest

from scripts.bench import prefill


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_prompts(capsys):
    args = prefill.Args(
        shape="tiny",
        codec=("exact",),
        batch=(2,),
        tokens=40,
        chunk=(16, 64),
        repeats=1,
        dtype="float32",
        json=True,
    )
    assert prefill.main(args) == 0
    rows = last_line(capsys)["results"]
    # A chunk is no longer than the prompt.
    assert [row["chunk"] for row in rows] == [16, 40]
    for row in rows:
        assert row["prefill_tokens_per_second"] == pytest.approx(2 * 40 / row["seconds"])
        assert row["seconds"] > 0 and row["error"] == 0  # one path on a CPU


def test_a_wrong_backend_fails_the_run(capsys, monkeypatch):
    monkeypatch.setattr(prefill, "relative_error", lambda *_: float("nan"))
    args = prefill.Args(shape="tiny", codec=("exact",), tokens=8, repeats=1, dtype="float32")
    assert prefill.main(args) == 1
    assert "can't be called fast" in capsys.readouterr().err


def test_a_shape_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="shape 'llama9' must be one of llama3-8b"):
        prefill.main(prefill.Args(shape="llama9"))
