"""scripts/bench/codecs.py: a tiny checkpoint, one cache beside the other, on a CPU."""

import json
from pathlib import Path

import pytest

from scripts.bench import codecs

ORACLE = Path(__file__).parents[2] / "oracles" / "llama"


def test_every_codec_is_measured_beside_exact(capsys):
    args = codecs.Args(
        model=str(ORACLE), codec=("int8",), context=20, pages=1, page_size=8, chunk=16, json=True
    )
    assert codecs.main(args) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    exact, coded = report["results"]
    assert (exact["codec"], coded["codec"], report["steps"]) == ("exact", "int8", 8)
    assert exact["overhead"] == 0
    assert coded["overhead"] == pytest.approx(coded["mean_ms"] / exact["mean_ms"] - 1)
    for row in report["results"]:
        assert 0 < row["median_ms"] <= row["p90_ms"] <= row["most_ms"]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="--pages 0 must be at least 1"):
        codecs.main(codecs.Args(pages=0))
