"""Each method against its paper's definition, written out over plain lists."""

from __future__ import annotations

import math

import pytest
import torch

from adaptrain.fusion import methods

BASE = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
A = torch.tensor([1.5, -2.2, 0.4, 2.0], dtype=torch.float64)
B = torch.tensor([0.8, -1.0, 0.9, 3.1], dtype=torch.float64)


def test_the_average_and_its_weights() -> None:
    assert methods.average([A, B]).tolist() == pytest.approx([1.15, -1.6, 0.65, 2.55])
    weighted = methods.average([A, B], [3, 1])
    assert weighted.tolist() == pytest.approx([0.75 * float(a) + 0.25 * float(b) for a, b in zip(A, B, strict=True)])


def test_wise_ft_lies_on_the_line() -> None:
    assert methods.wise_ft(BASE, A, 0.0).tolist() == BASE.tolist()
    assert methods.wise_ft(BASE, A, 1.0).tolist() == A.tolist()
    assert methods.wise_ft(BASE, A, 0.3).tolist() == pytest.approx((0.7 * BASE + 0.3 * A).tolist())


def test_slerp_lies_on_the_arc() -> None:
    right = methods.slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    assert right.tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(0.5)])
    third = methods.slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
    assert third.tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    assert methods.slerp(A, B, 0.0).tolist() == pytest.approx(A.tolist())
    assert methods.slerp(A, B, 1.0).tolist() == pytest.approx(B.tolist())


def test_slerp_of_parallel_and_of_zero_tensors_is_the_chord() -> None:
    assert methods.slerp(A, 2 * A, 0.5).tolist() == pytest.approx((1.5 * A).tolist())
    zero = torch.zeros(4, dtype=torch.float64)
    assert methods.slerp(zero, A, 0.25).tolist() == pytest.approx((0.25 * A).tolist())


def test_task_arithmetic_adds_what_tuning_changed() -> None:
    expected = [b + 0.4 * ((x - b) + (y - b)) for b, x, y in zip(BASE.tolist(), A.tolist(), B.tolist(), strict=True)]
    assert methods.task_arithmetic(BASE, [A, B], 0.4).tolist() == pytest.approx(expected)
    assert methods.task_arithmetic(BASE, [A], -1.0).tolist() == pytest.approx((2 * BASE - A).tolist())  # forgetting


def test_ties_trims_elects_a_sign_and_averages_those_that_have_it() -> None:
    base = torch.zeros(5)
    first = torch.tensor([4.0, 0.1, -2.0, 3.0, 0.0])
    second = torch.tensor([2.0, 5.0, 1.0, -4.0, 0.2])
    # Sizes below 1 go. Signs by the sums: +, +, -, -, none. Means of those that agree.
    merged = methods.ties(base, [first, second], [1.0, 1.0], 1.0)
    assert merged.tolist() == [3.0, 5.0, -2.0, -4.0, 0.0]
    assert methods.ties(base, [first, second], [1.0, 1.0], 0.5).tolist() == [1.5, 2.5, -1.0, -2.0, 0.0]


def test_dare_drops_at_random_and_keeps_the_mean() -> None:
    base, tuned = torch.ones(20_000), torch.full((20_000,), 3.0)
    merged = methods.dare(base, [tuned], 0.25, 1.0, torch.Generator().manual_seed(0))
    assert set(merged.tolist()) == {1.0, 9.0}  # the change of 2 is gone, or divided by a quarter
    assert float(merged.mean()) == pytest.approx(3.0, rel=0.05)
    again = methods.dare(base, [tuned], 0.25, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(merged, again)
    assert torch.equal(methods.dare(BASE, [A], 1.0, 1.0, torch.Generator()), methods.task_arithmetic(BASE, [A], 1.0))


def test_model_stock_goes_by_the_angle() -> None:
    base = torch.zeros(3)
    right = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])]
    assert methods.model_stock(base, right).tolist() == [0.0, 0.0, 0.0]  # nothing in common: the base
    same = [torch.tensor([1.0, 2.0, 0.0])] * 2
    assert methods.model_stock(base, same).tolist() == pytest.approx([1.0, 2.0, 0.0])
    angle = math.radians(60)
    pair = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle), 0.0])]
    share = 2 * 0.5 / (1 + 0.5)
    assert methods.model_stock(base, pair).tolist() == pytest.approx(
        [share * 0.75, share * math.sin(angle) / 2, 0.0], abs=1e-6
    )
