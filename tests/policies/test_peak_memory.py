from __future__ import annotations

import json
import random

import pytest

from adaptrain.policies.peak_memory import PeakMemoryFit

PER_TOKEN, PER_PAIR = 2e5, 300.0


def added(samples: int, length: int) -> float:
    return PER_TOKEN * samples * length + PER_PAIR * samples * length**2


def fitted(shapes, noise: float = 0.0) -> PeakMemoryFit:
    fit, generator = PeakMemoryFit(), random.Random(0)
    for samples, length in shapes:
        measured = added(samples, length) * (1 + noise * generator.random())
        fit.observe(samples, length, added_bytes=measured)
    return fit


def test_it_knows_nothing_before_a_measurement() -> None:
    assert PeakMemoryFit().predict(8, 128) is None


def test_it_recovers_the_formula() -> None:
    fit = fitted([(2, 32), (4, 64), (8, 128), (8, 32), (2, 256)])
    for shape in ((16, 128), (64, 64), (4, 512)):
        assert fit.predict(*shape) == pytest.approx(added(*shape), rel=1e-3)


def test_it_knows_what_is_smaller_in_tokens_and_in_pairs_of_tokens() -> None:
    fit = fitted([(16, 16)])
    assert fit.knows(16, 16)
    assert fit.knows(24, 10)
    assert not fit.knows(17, 16)
    assert not fit.knows(1, 256)  # as many tokens, but attention takes sixteen times as much


def test_one_measurement_already_bounds_twice_the_size() -> None:
    assert fitted([(8, 128)]).predict(16, 128) >= added(16, 128) * 0.999


def test_where_lengths_never_differed_a_longer_batch_is_predicted_with_care() -> None:
    fit = fitted([(2, 64), (4, 64), (8, 64)])
    assert fit.predict(16, 64) == pytest.approx(added(16, 64), rel=1e-3)
    assert fit.predict(8, 256) >= added(8, 256)


def test_no_measured_step_would_have_been_predicted_too_low() -> None:
    shapes = [(2**k, length) for k in range(5) for length in (16, 48, 100)]
    fit = fitted(shapes, noise=0.2)
    for samples, length, measured in fit.state_dict()["added"]:
        assert fit.predict(samples, length) >= measured * (1 - 1e-9)


def test_a_larger_batch_is_never_predicted_smaller() -> None:
    fit = fitted([(2, 16), (4, 100), (8, 48)], noise=0.3)
    predictions = [fit.predict(samples, 64) for samples in range(1, 65)]
    assert predictions == sorted(predictions)


def test_batches_without_sequences() -> None:
    fit = PeakMemoryFit()
    for samples in (4, 8):
        fit.observe(samples, 1, added_bytes=samples * 1e8)
    assert fit.predict(16, 1) == pytest.approx(1.6e9, rel=1e-6)


@pytest.mark.parametrize("limit", [added(1, 128) - 1, added(1, 128), added(7, 128), added(64, 128) * 2])
def test_the_largest_that_fits(limit: float) -> None:
    fit = fitted([(2, 128), (4, 128), (4, 256), (8, 64)])
    size = fit.largest_that_fits(64, 128, limit)
    assert 1 <= size <= 64
    assert size == 1 or fit.predict(size, 128) <= limit
    assert size == 64 or fit.predict(size + 1, 128) > limit


def test_only_so_many_measurements_are_kept_the_largest_among_them() -> None:
    fit = fitted([(samples, 128) for samples in range(1, 200)])
    assert len(fit.state_dict()["added"]) <= 64
    assert fit.knows(199, 128)


def test_its_state_is_plain() -> None:
    fit, other = fitted([(2, 128), (4, 64)]), PeakMemoryFit()
    other.load_state_dict(json.loads(json.dumps(fit.state_dict())))
    assert other.predict(16, 200) == fit.predict(16, 200)
    fit.clear()
    assert fit.predict(1, 1) is None


def test_what_ran_out_is_not_tried_again_before_there_is_more_room() -> None:
    fit = PeakMemoryFit()
    for length in (8, 16, 24):
        fit.observe(8, length, added_bytes=8.0 * length)
    assert fit.largest_that_fits(8, 64, 200.0) == 3
    fit.exceeded(3, 64, room_bytes=200.0)
    assert fit.largest_that_fits(8, 64, 200.0) == 2
    assert fit.largest_that_fits(8, 128, 200.0) == 1  # longer ones neither
    assert fit.largest_that_fits(8, 16, 200.0) == 8  # shorter ones as before
    assert fit.largest_that_fits(8, 64, 230.0) == 3
    other = PeakMemoryFit()
    other.load_state_dict(fit.state_dict())
    assert other.largest_that_fits(8, 64, 200.0) == 2
    other.clear()
    assert other.largest_that_fits(8, 64, 1.0) == 8
