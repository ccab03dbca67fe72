"""When a small model asks a larger one: the threshold on its confidence, solved for a cost or an accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def threshold_for_share(confidences: Sequence[float], share: float) -> float:
    """Returns the threshold below which at most a share of the samples falls; those are escalated.

    Args:
        confidences: The small model's confidence in each sample.
        share: The share that may be escalated; 0 or less: none, 1 or more: all.

    Returns:
        0.0 where none is to fall below it, infinity where all are.
    """
    count = math.floor(share * len(confidences) + 1e-9)
    if count <= 0:
        return 0.0
    if count >= len(confidences):
        return math.inf
    return sorted(confidences)[count]


def threshold_for_accuracy(
    confidences: Sequence[float], small_right: Sequence[bool], asked_right: Sequence[bool], accuracy: float
) -> tuple[float, float] | None:
    """Returns the lowest threshold that reaches an accuracy, and the share that is escalated.

    Args:
        confidences: The small model's confidence in each sample.
        small_right: Whether the small model is right.
        asked_right: Whether the answer is right where the large model was asked.
        accuracy: What is to be reached, in (0, 1].

    Returns:
        None where no threshold reaches it.
    """
    order = sorted(range(len(confidences)), key=confidences.__getitem__)
    right, total = sum(small_right), len(order)
    wanted = accuracy * total - 1e-9
    for count in range(total + 1):
        # Samples of one confidence are escalated together, so a threshold lies between two that differ.
        between = count in (0, total) or confidences[order[count]] > confidences[order[count - 1]]
        if right >= wanted and between:
            threshold = 0.0 if count == 0 else math.inf if count == total else confidences[order[count]]
            return threshold, count / total
        if count < total:
            right += asked_right[order[count]] - small_right[order[count]]
    return None


def accuracy_at(
    confidences: Sequence[float], small_right: Sequence[bool], asked_right: Sequence[bool], threshold: float
) -> float:
    """Returns the share of right answers where the large model is asked about those below the threshold."""
    chosen = (
        asked if confidence < threshold else small
        for confidence, small, asked in zip(confidences, small_right, asked_right, strict=True)
    )
    return sum(chosen) / len(confidences)
