"""scripts/shared/keep.py: options become a `Keep`, and flags are shared by the commands."""

import dataclasses

import pytest

import jaxkv
from jaxkv.codecs import codec_names, get_codec
from scripts import eval_quality, eval_streaming, generate, plan
from scripts.shared.command import parse
from scripts.shared.keep import CodecsOptions, KeepOptions, WindowOptions

LOSSY = tuple(name for name in codec_names() if name != "exact")


def test_one_flag_is_one_field_of_keep():
    given = dict(window=9, sink_tokens=2, sink_positions="cache", keep_first=1, keep_last=3)
    keep = KeepOptions(**given).keep("tq4", dtype="float16")
    assert keep == jaxkv.Keep(codec="tq4", dtype="float16", **given)
    assert KeepOptions().keep() == CodecsOptions().keep() == jaxkv.Keep()


def test_without_a_window_sinks_are_those_of_the_codecs():
    assert CodecsOptions(sink_tokens=4).keep() == jaxkv.Keep()
    kept = CodecsOptions(sink_tokens=4, window=16).keep()
    assert kept == jaxkv.Keep(window=16, sink_tokens=4)


@pytest.mark.parametrize("command", [generate, plan, eval_quality, eval_streaming])
def test_commands_share_the_flags(command):
    keep = parse(command.Args, ["--window", "64", "--sink-tokens", "3"]).keep
    assert (keep.window, keep.sink_tokens) == (64, 3)
    assert isinstance(keep, WindowOptions)
    if command is not eval_streaming:
        keep = parse(command.Args, ["--keep-first", "1", "--sink-positions", "cache"]).keep
        assert (keep.keep_first, keep.sink_positions) == (1, "cache")


def test_streaming_has_its_own_defaults():
    assert dataclasses.astuple(parse(eval_streaming.Args, []).keep) == (256, 4)
    assert parse(plan.Args, ["--codec", "tq4", "--codec", "int8"]).keep.codec == ("tq4", "int8")


def test_published_codecs_run_as_published_and_recipes_keep_theirs():
    chosen = CodecsOptions().choose(LOSSY)
    assert chosen == {name: get_codec(name) for name in LOSSY}
    assert (chosen["3bit_nc"].recent_pages, chosen["3bit_nc"].sink_tokens) == (0, 0)
    assert chosen["tq3"].recent_pages > 0 and chosen["tq3"].sink_tokens > 0
    changed = CodecsOptions(recent_pages=1, sink_tokens=9).choose(("3bit_nc", "tq3", "exact"))
    assert [(c.recent_pages, c.sink_tokens) for c in changed.values()] == [(1, 9), (1, 9), (0, 0)]
