"""Ranks within a budget: the best there are, never above it."""

from __future__ import annotations

import itertools
import random

import pytest

from adaptrain.policies.adapter_ranks import allocate_ranks


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_equal_cost_are_the_best_of_all_choices(seed: int) -> None:
    source = random.Random(seed)
    gains = [sorted((source.random() for _ in range(3)), reverse=True) for _ in range(4)]

    def worth(ranks) -> float:
        return sum(sum(own[:rank]) for own, rank in zip(gains, ranks, strict=True))

    for count in range(13):
        ranks = allocate_ranks(gains, [10] * 4, 10 * count + 5)
        assert sum(ranks) == count
        best = max(worth(each) for each in itertools.product(range(4), repeat=4) if sum(each) == count)
        assert worth(ranks) == pytest.approx(best)


def test_a_rank_is_weighed_against_its_cost() -> None:
    assert allocate_ranks([[4.0, 4.0], [3.0, 3.0]], [100, 10], 120) == [1, 2]
    assert allocate_ranks([[4.0, 4.0], [3.0, 3.0]], [100, 10], 119) == [0, 2]


def test_what_no_longer_fits_makes_way_for_what_does() -> None:
    assert allocate_ranks([[9.0, 8.0], [0.1, 0.1, 0.1]], [50, 1], 99) == [1, 3]


def test_what_gains_nothing_gets_nothing() -> None:
    assert allocate_ranks([[0.0, 0.0], [1.0], []], [1, 1, 1], 100) == [0, 1, 0]
    assert allocate_ranks([], [], 10) == []
