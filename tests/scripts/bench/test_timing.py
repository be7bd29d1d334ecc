"""scripts/bench/timing.py: sums of kernels by call, by kind and by name; calls without a GPU."""

import pytest

from scripts.bench import timing


def test_device_time_is_the_median_call_of_the_ops_own_kernels(monkeypatch):
    own = [("paged_attention_decode", 10.0), ("paged_attention_combine", 1.0)]
    calls = [[("fusion", 2.0), *own], [("fusion", 2.0), *own], [("fusion", 4.0), own[0], own[0]]]
    kernels = [(i, *kernel) for i, kernel in enumerate(sum(calls, []))]
    monkeypatch.setattr(timing, "device_kernels", lambda calls: kernels)
    found = timing.device_time([lambda: None] * 3)
    assert found is not None
    assert (found.us, found.us_min, found.us_max, found.all_us) == (11, 11, 20, 13)
    assert found.kernels == {
        "fusion": 2.67,
        "paged_attention_decode": 13.33,
        "paged_attention_combine": 0.67,
    }
    monkeypatch.setattr(timing, "device_kernels", lambda calls: [])
    assert timing.device_time([lambda: None]) is None


def test_without_a_gpu_calls_are_timed_by_the_clock():
    calls = []
    found = timing.time_calls([lambda: calls.append(1)] * 5)
    assert len(calls) == 6  # one warms up
    assert 0 < found.us_min <= found.us <= found.us_max and found.kernels is None


KERNELS = [(0, "paged_attention", 3.0), (1, "plan_work", 1.0), (2, "nvjet_1", 20.0)]
KERNELS += [(3, "fusion_1", 2.0), (4, "fusion_2", 4.0)]


def test_every_kernel_is_of_one_kind():
    found = timing.time_by_kind(KERNELS)
    assert found == pytest.approx({"attention": 0.004, "weights": 0.02, "rest": 0.006})


def test_kernels_that_differ_by_number_are_listed_together():
    listed = timing.list_kernels(KERNELS, 2, 2)
    assert listed["kernel"] == ["nvjet", "fusion"] and listed["launches"] == ["0.5", "1.0"]
    assert listed["us"] == ["10.0", "3.0"] and listed["us each"] == ["20.00", "3.00"]
