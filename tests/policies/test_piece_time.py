"""What a micro-batch costs beside its tokens, from times of known truth."""

from __future__ import annotations

import random

import pytest

from adaptrain.policies.piece_time import PieceTimeFit


def fitted(cost: float, *, noise: float = 0.0, hiccups: float = 0.0, seed: int = 0) -> PieceTimeFit:
    draw, fit = random.Random(seed), PieceTimeFit()
    for _ in range(48):
        tokens = draw.randint(20, 600)
        seconds = (cost + tokens) * 4e-4 * draw.gauss(1, noise)
        fit.observe(tokens, seconds * (5 if draw.random() < hiccups else 1))
    return fit


@pytest.mark.parametrize("cost", [0.0, 20.0, 80.0])
def test_it_is_found_exactly_without_noise(cost: float) -> None:
    assert fitted(cost).piece_cost == pytest.approx(cost, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_hiccups_move_it_little(seed: int) -> None:
    found = fitted(60.0, noise=0.05, hiccups=0.1, seed=seed).piece_cost
    assert found is not None
    assert 35 < found < 90


def test_nothing_is_said_before_three_sizes_were_seen() -> None:
    fit = PieceTimeFit()
    assert fit.piece_cost is None
    for tokens in (10, 10, 20, 20):
        fit.observe(tokens, 0.1)
    assert fit.piece_cost is None


def test_times_that_fall_with_size_say_nothing() -> None:
    fit = PieceTimeFit()
    for tokens in (10, 20, 30, 40):
        fit.observe(tokens, 1.0 / tokens)
    assert fit.piece_cost is None


def test_new_times_replace_old_ones() -> None:
    fit = fitted(10.0)
    for tokens in range(20, 20 + 48 * 5, 5):
        fit.observe(tokens, (90 + tokens) * 1e-3)
    assert fit.piece_cost == pytest.approx(90, abs=1e-6)


def test_its_state_goes_on() -> None:
    fit, other = fitted(33.0), PieceTimeFit()
    other.load_state_dict(fit.state_dict())
    assert other.piece_cost == fit.piece_cost
    other.clear()
    assert other.piece_cost is None
