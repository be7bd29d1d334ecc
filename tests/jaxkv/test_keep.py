"""How `Keep.apply` changes the specs of a model's own layers."""

import dataclasses

import pytest

from jaxkv import Keep, LayerSpec

SLIDING = LayerSpec(kv_heads=2, head_dim=8, window=16, dtype="float32")
FULL = LayerSpec(kv_heads=3, head_dim=4, dtype="float32")
LAYERS = (SLIDING, FULL, SLIDING)


def test_by_default_layers_stay_as_they_are():
    assert Keep().apply(LAYERS) == LAYERS


def test_each_field_reaches_every_layer_that_it_is_for():
    sinks = Keep(sink_tokens=4, sink_positions="cache", dtype="bfloat16").apply(LAYERS)
    own = dataclasses.replace(
        SLIDING, sink_tokens=4, sink_positions="cache", dtype="bfloat16"
    )  # sinks stand beside a window only
    assert sinks == (own, dataclasses.replace(FULL, dtype="bfloat16"), own)


@pytest.mark.parametrize("window, expected", [(5, (5, 5, 5)), (99, (16, 99, 16))])
def test_a_window_narrows_and_never_widens(window, expected):
    assert tuple(spec.window for spec in Keep(window=window).apply(LAYERS)) == expected


@pytest.mark.parametrize(
    "first, last, coded", [(0, 0, (0, 1, 2)), (1, 0, (1, 2)), (0, 2, (0,)), (1, 2, ())]
)
def test_first_and_last_layers_stay_exact(first, last, coded):
    specs = Keep(codec="tq4", keep_first=first, keep_last=last).apply(LAYERS)
    assert tuple(n for n, spec in enumerate(specs) if spec.codec == "tq4") == coded
    assert all(spec.codec == "exact" for n, spec in enumerate(specs) if n not in coded)


@pytest.mark.parametrize(
    "layers, keep, message",
    [
        ((FULL,), dict(sink_tokens=4), "sink_tokens=4 needs a window, and no layer has one"),
        ((FULL,), dict(sink_positions="cache"), "sink_tokens=0 needs a window"),
        (LAYERS, dict(keep_first=2, keep_last=2), "keep_first=2, keep_last=2 must name some of 3"),
        (LAYERS, dict(keep_first=-1), "keep_first=-1 must not be negative"),
    ],
)
def test_layers_that_cannot_be_kept_so_are_refused(layers, keep, message):
    with pytest.raises(ValueError, match=message):
        Keep(**keep).apply(layers)


def test_equal_values_are_one_key():
    assert {Keep(codec="tq4"): 1}[Keep(codec="tq4", window=None)] == 1
