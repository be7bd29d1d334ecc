"""scripts/bench/tune.py: settings are tried, checked and compared; interpreted on a CPU."""

import json

import pytest

from scripts.bench import tune

TINY = dict(workload="tiny", batch=2, context=70, codec="4bit_nc", rounds=1, repeats=1, json=True)


def report_of(capsys, **options) -> tuple[int, dict]:
    code = tune.main(tune.Args(**TINY | options))
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_value_of_a_field_is_tried_and_right(capsys):
    code, report = report_of(capsys, field=("stages", "early_factors"))
    assert code == 0
    settings = {row["setting"] for row in report["tried"]}
    assert {"default", "stages=2", "stages=3"} <= settings and len(settings) == 4
    assert report["best"] in settings
    for row in report["tried"]:
        assert 0 < row["us"] < float("inf") and row["error"] < 3e-3


def test_a_wrong_result_is_never_best(capsys, monkeypatch):
    monkeypatch.setattr(tune, "MAX_ERROR", 1e-12)
    code, report = report_of(capsys, field=("stages",))
    assert code == 1 and report["best"] == "default"
    assert {row["why"] for row in report["tried"]} == {"wrong"}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(workload="llama9"), "--workload 'llama9' must be one of llama-3-8b"),
        (dict(field=("stage",)), "--field 'stage' must be one of at_once, waves"),
        (dict(rounds=0), "--rounds 0 must be at least 1"),
        (dict(codec="5bit"), "5bit"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tune.main(tune.Args(**TINY | options))
