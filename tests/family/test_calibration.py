from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from adaptrain.family.calibration import calibration_error, fit_temperature, fit_weight


def drawn(samples: int = 4000, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose softmax is the chance of each class, and classes drawn from it."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(samples, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("off", [0.3, 1.0, 3.0])
def test_a_temperature_that_is_off_is_found(off):
    logits, labels = drawn()
    assert fit_temperature(off * logits, labels) == pytest.approx(off, rel=0.05)


def test_no_other_temperature_is_likelier():
    logits, labels = drawn(300)
    best = fit_temperature(logits, labels)
    loss = F.cross_entropy(logits / best, labels)
    assert all(loss <= F.cross_entropy(logits / (best * factor), labels) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))


def test_it_stays_in_its_range():
    labels = torch.tensor([0, 1, 0, 1])
    assert fit_temperature(F.one_hot(labels, 2).float(), labels) == pytest.approx(1 / 20, rel=0.01)
    assert fit_temperature(F.one_hot(1 - labels, 2).float(), labels) == pytest.approx(20, rel=0.01)


def test_the_error_is_small_where_confidence_is_right():
    logits, labels = drawn()
    calibrated = calibration_error(logits.softmax(-1), labels)
    assert calibrated < 0.03
    assert calibration_error((3 * logits).softmax(-1), labels) > 3 * calibrated
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_the_weight_of_a_mixture_is_found(share):
    one, other = drawn()[0].softmax(-1), drawn()[0].flip(0).softmax(-1)
    generator = torch.Generator().manual_seed(1)
    labels = torch.multinomial(one.lerp(other, share), 1, generator=generator)[:, 0]
    assert fit_weight(one, other, labels) == pytest.approx(share, abs=0.05)


def test_a_class_that_neither_thinks_possible_does_no_harm():
    impossible = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert fit_weight(impossible, other, torch.tensor([1, 1])) == pytest.approx(0.0, abs=1e-6)
