from __future__ import annotations

import math

import pytest

from adaptrain.policies.cascade import accuracy_at, threshold_for_accuracy, threshold_for_share

CONFIDENCES = [0.9, 0.4, 0.6, 0.8, 0.5]
SMALL = [True, False, False, True, True]
LARGE = [True, True, True, True, False]


@pytest.mark.parametrize(("share", "below"), [(-0.1, 0), (0.0, 0), (0.19, 0), (0.2, 1), (0.59, 2), (0.6, 3), (1.0, 5)])
def test_a_share_of_the_samples_falls_below(share, below):
    threshold = threshold_for_share(CONFIDENCES, share)
    assert sum(confidence < threshold for confidence in CONFIDENCES) == below


def test_equal_confidences_never_exceed_the_share():
    threshold = threshold_for_share([0.5] * 10, 0.7)
    assert sum(confidence < threshold for confidence in [0.5] * 10) == 0


@pytest.mark.parametrize(("accuracy", "share"), [(0.5, 0.0), (0.6, 0.0), (0.8, 0.2), (0.75, 0.2)])
def test_the_least_share_that_reaches_an_accuracy(accuracy, share):
    answer = threshold_for_accuracy(CONFIDENCES, SMALL, LARGE, accuracy)
    assert answer is not None
    threshold, escalated = answer
    assert escalated == share
    assert accuracy_at(CONFIDENCES, SMALL, LARGE, threshold) >= accuracy


def test_what_no_threshold_reaches():
    assert threshold_for_accuracy(CONFIDENCES, SMALL, LARGE, 0.9) is None


def test_all_are_escalated_where_that_alone_reaches_it():
    assert threshold_for_accuracy([0.5, 0.5], [False, False], [True, True], 1.0) == (math.inf, 1.0)


@pytest.mark.parametrize("accuracy", [0.2, 0.55, 0.7, 0.8])
def test_against_every_threshold_there_is(accuracy):
    import random

    generator = random.Random(7)
    confidences = [round(generator.random(), 1) for _ in range(60)]
    small = [generator.random() < confidence for confidence in confidences]
    large = [generator.random() < 0.8 for _ in confidences]
    reaching = [
        sum(c < t for c in confidences) / len(confidences)
        for t in (0.0, *confidences, math.inf)
        if accuracy_at(confidences, small, large, t) >= accuracy
    ]
    answer = threshold_for_accuracy(confidences, small, large, accuracy)
    assert (answer is None) == (not reaching)
    if answer is not None:
        assert answer[1] == min(reaching)
