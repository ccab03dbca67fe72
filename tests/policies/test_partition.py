"""Where a sorted batch is cut, against every way there is to cut it."""

from __future__ import annotations

import itertools
import random

import pytest

from adaptrain.policies.partition import cheapest_bounds, even_bounds


def cost(lengths: list[int], bounds: list[int], piece_cost: float) -> float:
    return sum(piece_cost + (last - first) * lengths[first] for first, last in itertools.pairwise(bounds))


def cheapest_of_all(lengths: list[int], most: int, piece_cost: float) -> float:
    inner = range(1, len(lengths))
    ways = [
        [0, *cuts, len(lengths)]
        for count in range(len(lengths))
        for cuts in itertools.combinations(inner, count)
        if all(b - a <= most for a, b in itertools.pairwise([0, *cuts, len(lengths)]))
    ]
    return min(cost(lengths, bounds, piece_cost) for bounds in ways)


@pytest.mark.parametrize("seed", range(20))
def test_distinct_lengths_are_cut_where_it_is_cheapest(seed: int) -> None:
    draw = random.Random(seed)
    lengths = sorted(draw.sample(range(1, 60), 10), reverse=True)
    most, piece_cost = draw.randint(1, 10), draw.choice([0.0, 5.0, 40.0, 300.0])
    bounds = cheapest_bounds(lengths, most, piece_cost)
    assert bounds[0] == 0
    assert bounds[-1] == 10
    assert all(0 < b - a <= most for a, b in itertools.pairwise(bounds))
    assert cost(lengths, bounds, piece_cost) == cheapest_of_all(lengths, most, piece_cost)


def test_free_micro_batches_leave_no_padding_and_dear_ones_leave_one() -> None:
    lengths = [9, 9, 7, 3, 3, 3]
    assert cheapest_bounds(lengths, 6, 0.0) == [0, 2, 3, 6]
    assert cheapest_bounds(lengths, 6, 1e9) == [0, 6]


@pytest.mark.parametrize(("size", "most"), [(10, 3), (7, 7), (7, 100), (1, 1), (9, 2)])
def test_equal_lengths_are_cut_evenly(size: int, most: int) -> None:
    assert cheapest_bounds([5] * size, most, 8.0) == even_bounds(0, size, most)


def test_even_parts_differ_by_one_at_most() -> None:
    sizes = [b - a for a, b in itertools.pairwise(even_bounds(0, 64, 12))]
    assert sum(sizes) == 64
    assert max(sizes) <= 12
    assert max(sizes) - min(sizes) <= 1
