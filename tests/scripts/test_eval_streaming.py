"""scripts/eval_streaming.py: four caches on a tiny checkpoint, one-line errors."""

import json

import pytest

from scripts import eval_streaming
from scripts.shared.keep import WindowOptions


def test_four_caches_are_compared(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Some text that is long enough for this. " * 4)
    args = eval_streaming.Args(
        model=str(folder), text=text, tokens=100, chunk=32, json=True,
        keep=WindowOptions(window=16, sink_tokens=2),
    )  # fmt: skip
    assert eval_streaming.main(args) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = list(report["perplexity"])
    assert names[:3] == ["full attention", "window 16", "window 16, 2 sinks"]
    assert names[3] == "window 16, 2 sinks, cache positions"
    assert report["ratio"]["full attention"] == 1
    assert len({round(value, 6) for value in report["perplexity"].values()}) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=1), "--tokens 1 must be at least 2"),
        (dict(chunk=0), "--chunk 0 must be at least 1"),
        (dict(tokens=100), "has 40 tokens, fewer than --tokens 100"),
        (dict(tokens=30, keep=WindowOptions(window=0)), "window=0 must be at least 1"),
        (dict(tokens=30, keep=WindowOptions(sink_tokens=4)), "sink_tokens=4 needs a window"),
    ],
)
def test_bad_arguments_are_named(folder, tmp_path, change, message):
    text = tmp_path / "text.txt"
    text.write_text("x" * 40)
    with pytest.raises(ValueError, match=message):
        eval_streaming.main(eval_streaming.Args(model=str(folder), text=text, **change))
