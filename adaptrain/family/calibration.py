"""Confidence that means what it says: one temperature for a classifier's logits, one weight for two that answer."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

_LARGEST = 20.0
_ROUNDS = 40
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns the temperature by which logits are to be divided, so that the softmax is likeliest to give the labels.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks" (temperature scaling). The loss has one minimum
    over the temperature.

    Args:
        logits: Of samples the model was not trained on, shape (samples, classes).
        labels: Their classes, shape (samples,).

    Returns:
        A number between 1/20 and 20.
    """
    logits = logits.double()

    def loss(exponent: float) -> float:
        return float(F.cross_entropy(logits / math.exp(exponent), labels))

    return math.exp(_lowest(loss, -math.log(_LARGEST), math.log(_LARGEST)))


def of_right(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns the probability of the right class of each sample, shape (samples,).

    Args:
        probabilities: Shape (samples, classes).
        labels: Shape (samples,).
    """
    return probabilities.gather(-1, labels[:, None])[:, 0]


def fit_weight(one: Tensor, other: Tensor, labels: Tensor) -> float:
    """Returns the weight of the second in the mean of two classifiers' probabilities that is likeliest to be right.

    A mean of probabilities is the linear opinion pool (Stone 1961); its likelihood has one maximum over the weight.

    Args:
        one: Probabilities of samples that neither was trained on, shape (samples, classes).
        other: Of the same samples and shape.
        labels: Their classes, shape (samples,).

    Returns:
        A number in [0, 1].
    """
    first, second = (of_right(each.double(), labels) for each in (one, other))
    return _lowest(lambda weight: -float(first.lerp(second, weight).clamp_min(1e-300).log().mean()), 0.0, 1.0)


def _lowest(loss: Callable[[float], float], low: float, high: float) -> float:
    """Returns where a function of one minimum has it, by golden-section search."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(_ROUNDS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = loss(right)
    return (low + high) / 2


def calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Returns the expected calibration error: how far confidence is from accuracy, over bins of confidence.

    Source: Naeini et al. 2015; Guo et al. 2017, section 2.

    Args:
        probabilities: Shape (samples, classes).
        labels: Shape (samples,).
        bins: Bins of equal width over (0, 1].
    """
    confidence, answer = probabilities.max(-1)
    right = (answer == labels).double()
    place = (confidence * bins).ceil().clamp(1, bins)
    error = 0.0
    for number in place.unique():
        inside = place == number
        gap = confidence[inside].double().mean() - right[inside].mean()
        error += float(gap.abs() * inside.double().mean())
    return error
