"""scripts/shared/summaries.py: error bars and paired differences against numbers by hand."""

import math

import numpy as np
import pytest

from scripts.shared.documents import Document, Source
from scripts.shared.scoring import Reading, Scores
from scripts.shared.summaries import mean_and_error, summarize


def make_source(whole: bool, documents: int) -> Source:
    document = Document(np.arange(3), np.arange(2), np.zeros((2, 0)), whole)
    return Source("task" if whole else "text", "name", 2, [document] * documents)


def make_reading(kl, exact, coded, agrees, exact_right, right) -> Reading:
    """Scores of two predictions from probabilities of the target."""
    f32 = lambda x: np.float32(x)
    scores = Scores(
        f32(kl), np.log(f32(exact)), np.log(f32(coded)), f32(agrees), f32(exact_right), f32(right)
    )
    return Reading(scores, held_bits=5.0, stored_bits=4.5)


def test_standard_error_of_three():
    assert mean_and_error([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert mean_and_error([1.0]) == (1.0, None)


READINGS = [
    make_reading([0.1, 0.3], [0.5, 0.5], [0.5, 0.125], [1, 0], [1, 1], [1, 0]),
    make_reading([0.2, 0.6], [0.5, 0.5], [0.5, 0.5], [1, 1], [1, 0], [1, 1]),
]


def test_summary_of_a_text():
    row = summarize("model", make_source(False, 2), "codec", READINGS)
    assert row["bits_per_value"] == 5 and row["coded_bits_per_value"] == 4.5
    assert row["kl"] == pytest.approx(0.3) and row["kl_se"] == pytest.approx(0.1)
    assert row["kl_p99"] == pytest.approx(0.591)  # of all four predictions
    # the documents lose ln 2 and 0 per token
    assert row["ppl_ratio"] == pytest.approx(math.sqrt(2))
    assert row["ppl_ratio_se"] == pytest.approx(math.sqrt(2) * math.log(2) / 2)
    assert row["top1"] == 0.75 and row["top1_se"] == pytest.approx(0.25)
    assert row["accuracy"] == 0.75 and row["accuracy_change"] == 0


def test_a_task_is_right_if_all_its_answers_are():
    row = summarize("model", make_source(True, 2), "codec", READINGS)
    assert row["accuracy"] == 0.5 and row["accuracy_se"] == 0.5
    # one instance lost, one won: no change on average, and the error says how little that tells
    assert row["accuracy_change"] == 0 and row["accuracy_change_se"] == 1


def test_a_paired_difference_has_a_smaller_error_than_its_parts():
    lost = make_reading([1, 1], [0.5, 0.5], [0.5, 0.5], [1, 1], [1, 1], [1, 0])
    kept = make_reading([1, 1], [0.5, 0.5], [0.5, 0.5], [1, 1], [1, 1], [1, 1])
    never = make_reading([1, 1], [0.5, 0.5], [0.5, 0.5], [1, 1], [0, 0], [0, 0])
    row = summarize("model", make_source(True, 8), "c", [lost, *[kept] * 3, *[never] * 4])
    assert row["accuracy_change"] == -0.125 and row["accuracy_change_se"] == pytest.approx(0.125)
    assert row["accuracy_se"] > 0.18
