"""scripts/bench/segments.py: bytes that are seen, one run on a CPU, one-line errors."""

import json

import pytest

import jaxkv
from scripts.bench import segments
from scripts.bench.cases import WORKLOADS
from scripts.bench.segments import Args, layer_spec, visible_bytes

TINY = dict(workload="tiny", batch=2, context=150, page_size=16, repeats=1, window=70)
HEADS, DIM, PAGE = 2, 64, 16  # of "tiny"


def config_of(codec: str, *, together: bool, **options) -> jaxkv.CacheConfig:
    args = Args(**TINY | options)
    spec = layer_spec(args, WORKLOADS["tiny"], codec, together=together)
    config = jaxkv.CacheConfig(
        layers=(spec,), batch=1, max_tokens=512, page_size=PAGE, platform="gpu"
    )
    return config.checked()


def test_bytes_seen_are_counted_by_store():
    exact = 2 * HEADS * DIM * 2  # bfloat16
    code = HEADS * 2 * DIM * 0.5 + 2 * HEADS * 3  # 4 bits; a scale, and a value's scale and zero
    plain = config_of("4bit_nc", together=False)
    assert visible_bytes(plain, 150) == visible_bytes(plain, 160) == 70 * code
    # Two recent pages, 128 to 150, and 4 sinks are exact; the window begins at 81.
    together = config_of("4bit_nc", together=True)
    assert visible_bytes(together, 150) == (151 - 128 + 4) * exact + (128 - 81) * code


def test_both_ways_are_measured_and_right(capsys):
    code = segments.main(Args(**TINY, codec=("tq4",), json=True))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    plain, together = report["results"]
    assert (plain["together"], together["together"]) == (False, True)
    assert plain["more_a_byte"] == 0 and together["mb"] > plain["mb"]
    for row in report["results"]:
        assert row["error"] < 1e-5 and row["us"] > 0


def test_a_wrong_result_fails_the_run(capsys, monkeypatch):
    monkeypatch.setattr(segments, "MAX_ERROR", -1.0)
    assert segments.main(Args(**TINY, codec=("4bit_nc",))) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(workload="llama9"), "--workload 'llama9' must be one of llama-3-8b"),
        (dict(recent_pages=-1), "--recent-pages -1 must not be negative"),
        (dict(batch=0), "--batch 0 must be at least 1"),
        (dict(window=0), "window=0 must be at least 1"),
        (dict(codec=("exact",)), "--codec exact: an exact cache has no coded pages"),
        (dict(codec=("5bit",)), "5bit"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        segments.main(Args(**TINY | options))
