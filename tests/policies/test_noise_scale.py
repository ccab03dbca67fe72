"""The noise scale against gradients of known noise, and the policy that follows it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from statistics import fmean, stdev

import pytest

from adaptrain import ConfigurationError, GradientNoiseScale
from adaptrain.policies.noise_scale import NoiseScale

# The estimator -------------------------------------------------------------------------------------------------------

MEAN = [0.3, -0.2, 0.5, 0.1]
SIGMAS = [2.0, 1.0, 0.5, 3.0]
SIGNAL = sum(g * g for g in MEAN)  # |G|² = 0.39
NOISE = sum(s * s for s in SIGMAS)  # tr(Σ) = 14.25


def batch_mean(chance: random.Random, count: int) -> list[float]:
    return [chance.gauss(g, s / math.sqrt(count)) for g, s in zip(MEAN, SIGMAS, strict=True)]


def two_norms(chance: random.Random, small: int, big: int, *, nested: bool = True) -> dict[str, float]:
    """As in a step: the small batch is a part of the big one (`nested`), or independent of it."""
    few = batch_mean(chance, small)
    if nested:
        rest = batch_mean(chance, big - small)
        many = [(small * a + (big - small) * b) / big for a, b in zip(few, rest, strict=True)]
    else:
        many = batch_mean(chance, big)
    return {
        "small": small,
        "small_squared_norm": sum(g * g for g in few),
        "big": big,
        "big_squared_norm": sum(g * g for g in many),
    }


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("small", "big"), [(1, 64), (8, 32), (24, 32)])
def test_both_estimates_are_unbiased(small: int, big: int, nested: bool):
    chance = random.Random(small)
    signals, noises = [], []
    for _ in range(20_000):
        one = NoiseScale(smoothing=0.0)
        one.observe(**two_norms(chance, small, big, nested=nested))
        signals.append(one.signal)
        noises.append(one.noise)
    for values, truth in ((signals, SIGNAL), (noises, NOISE)):
        error = stdev(values) / math.sqrt(len(values))
        assert abs(fmean(values) - truth) < 4 * error
        assert error < 0.25 * truth  # else the line above would say little


def test_the_quotient_of_averages_is_near_where_a_single_steps_is_not():
    truth = NOISE / SIGNAL
    chance = random.Random(1)
    averaged, single = [], []
    for _ in range(200):
        scale = NoiseScale(smoothing=0.99)
        for _ in range(500):
            scale.observe(**two_norms(chance, 8, 64))
        averaged.append(scale.value)
        alone = NoiseScale(smoothing=0.0)
        alone.observe(**two_norms(chance, 8, 64))
        single.append(alone.value)
    assert fmean(averaged) == pytest.approx(truth, rel=0.05)
    assert stdev(averaged) < 0.25 * truth
    off = [abs(value - truth) > 0.5 * truth for value in single]
    assert fmean(off) > 0.4


def test_longer_averages_vary_less():
    chance = random.Random(2)
    spread = {}
    for smoothing in (0.9, 0.99):
        values = []
        for _ in range(100):
            scale = NoiseScale(smoothing=smoothing)
            for _ in range(400):
                scale.observe(**two_norms(chance, 8, 64))
            values.append(scale.noise)
        assert fmean(values) == pytest.approx(NOISE, rel=0.1)
        spread[smoothing] = stdev(values)
    # An average with smoothing s has (1-s)/(1+s) of the variance of one step's.
    expected = math.sqrt((0.01 / 1.99) / (0.1 / 1.9))
    assert spread[0.99] / spread[0.9] == pytest.approx(expected, rel=0.3)


def test_the_first_steps_are_no_less_than_the_later_ones():
    scale = NoiseScale(smoothing=0.99)
    scale.observe(small=1, small_squared_norm=3.0, big=2, big_squared_norm=2.0)
    assert scale.value == pytest.approx(2.0 / 1.0)  # tr(Σ) = 1/(1 - 1/2), |G|² = 2·2 − 3
    assert (scale.noise, scale.signal) == pytest.approx((2.0, 1.0))


def test_values_that_are_not_finite_are_left_out():
    scale = NoiseScale()
    scale.observe(small=1, small_squared_norm=math.inf, big=2, big_squared_norm=1.0)
    scale.observe(small=1, small_squared_norm=math.nan, big=2, big_squared_norm=1.0)
    assert scale.value is None
    scale.observe(small=1, small_squared_norm=5.0, big=2, big_squared_norm=1.0)
    assert scale.value == math.inf  # no signal is left in so much noise
    quiet = NoiseScale()
    quiet.observe(small=1, small_squared_norm=1.0, big=2, big_squared_norm=1.0)
    assert quiet.value == 0.0


# The policy ----------------------------------------------------------------------------------------------------------


def run(
    policy: GradientNoiseScale,
    size: int,
    steps: int,
    *,
    noise: float,
    seed: int = 0,
    speed: Callable[[int], float] | None = None,
) -> list[int]:
    """Steps over gradients whose noise scale is `noise`, at samples/s by size; returns the size after each."""
    chance = random.Random(seed)
    factor = math.sqrt(noise / (NOISE / SIGNAL))
    sizes = []
    for _ in range(steps):
        few = [chance.gauss(g, factor * s / math.sqrt(size / 4)) for g, s in zip(MEAN, SIGMAS, strict=True)]
        rest = [chance.gauss(g, factor * s / math.sqrt(size * 3 / 4)) for g, s in zip(MEAN, SIGMAS, strict=True)]
        many = [(a + 3 * b) / 4 for a, b in zip(few, rest, strict=True)]
        policy.observe(
            small=size / 4,
            small_squared_norm=sum(g * g for g in few),
            big=size,
            big_squared_norm=sum(g * g for g in many),
        )
        if speed is not None:
            policy.observe_speed(speed(size) * chance.uniform(0.95, 1.05) * (0.1 if chance.random() < 0.1 else 1.0))
        if (proposal := policy.next(size, progress=0.5, unit=1)) is not None:
            policy.changed()
            assert proposal.new in (2 * size, size // 2, policy.maximum)
            size = proposal.new
        sizes.append(size)
    return sizes


@pytest.mark.parametrize("begin", [8, 1024])
def test_it_settles_near_the_noise_scale_and_stays(begin: int):
    policy = GradientNoiseScale(maximum=4096, minimum=8, every=50, smoothing=0.99)
    assert policy.first(begin) == begin
    sizes = run(policy, begin, 3000, noise=100)
    assert all(64 <= size <= 256 for size in sizes[1000:])
    changes = [i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]]
    assert all(later - earlier >= 50 for earlier, later in itertools.pairwise(changes))
    assert len([i for i in changes if i > 1000]) <= 3  # of 40 that it could have made


def test_bounds_hold():
    policy = GradientNoiseScale(maximum=24, every=10)
    assert policy.first(8) == 8
    assert run(policy, 8, 500, noise=1e6)[-1] == 24
    policy = GradientNoiseScale(maximum=64, every=10)
    assert policy.first(16) == 16  # the loader's is the least
    assert run(policy, 16, 500, noise=0.01)[-1] == 16
    # A resumed run with another maximum comes back into its bounds at once.
    state = json.loads(json.dumps(policy.state_dict()))
    smaller = GradientNoiseScale(maximum=8, minimum=4)
    smaller.load_state_dict(state)
    back = smaller.next(16, progress=0.1, unit=1)
    assert back is not None
    assert (back.new, "bounds" in back.reason) == (8, True)


def test_it_halves_only_to_what_can_be_divided():
    policy = GradientNoiseScale(maximum=64, minimum=6, every=1, smoothing=0.0)
    policy.observe(small=3, small_squared_norm=1.0, big=12, big_squared_norm=0.999)
    assert policy.next(12, progress=0.5, unit=4) is None
    half = policy.next(12, progress=0.5, unit=2)
    assert half is not None
    assert half.new == 6
    assert half.readings["noise_scale"] < 4


def changes(sizes: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in itertools.pairwise(sizes) if a != b]


def test_a_growth_that_costs_speed_is_taken_back_and_not_tried_again_for_long():
    policy = GradientNoiseScale(maximum=1024, minimum=8, every=30)
    sizes = run(policy, 8, 650, noise=1e6, speed=lambda size: 1000.0 if size <= 32 else 500.0)
    assert changes(sizes) == [(8, 16), (16, 32), (32, 64), (64, 32)]
    assert sizes.count(64) == 20  # as many steps as its speed takes to know
    # In time it is tried again, and taken back again.
    longer = run(policy, 32, 1500, noise=1e6, speed=lambda size: 1000.0 if size <= 32 else 500.0)
    assert set(changes(longer)) == {(32, 64), (64, 32)}
    assert longer.count(64) <= 3 * 20
    # What held it back may be over by then.
    assert run(policy, 32, 2000, noise=1e6, speed=lambda size: 1000.0)[-1] == 1024


def test_the_way_back_says_both_speeds():
    policy = GradientNoiseScale(maximum=64, minimum=8, every=1)
    for _ in range(20):
        policy.observe(small=1, small_squared_norm=5.0, big=2, big_squared_norm=1.0)
        policy.observe_speed(800.0)
    grown = policy.next(32, progress=0.1, unit=4)
    assert grown is not None
    assert (grown.old, grown.new) == (32, 64)
    policy.changed()
    for _ in range(19):
        policy.observe_speed(200.0)
    assert policy.next(64, progress=0.1, unit=4) is None
    policy.observe_speed(200.0)
    back = policy.next(64, progress=0.1, unit=4)
    assert back is not None
    assert (back.old, back.new) == (64, 32)
    assert "200 samples/s, 75% below the 800 at 32" in back.reason
    assert back.readings == {"samples_per_s": 200.0, "samples_per_s_before": 800.0}
    assert policy.next(64, progress=0.1, unit=64) is None  # 32 cannot be divided among so many
    policy.next(64, progress=0.1, unit=4)
    policy.changed()
    policy.observe(small=1, small_squared_norm=5.0, big=2, big_squared_norm=1.0)
    assert policy.next(32, progress=0.1, unit=4) is None
    policy.forget_speeds()  # another structure: it may be fast now
    again = policy.next(32, progress=0.1, unit=4)
    assert again is not None
    assert again.new == 64


@pytest.mark.parametrize(("slowdown", "loss"), [(0.2, 0.9), (0.5, 0.6), (None, 0.01)])
def test_speed_that_falls_by_less_than_may_be_is_no_reason(slowdown: float | None, loss: float):
    policy = GradientNoiseScale(maximum=256, minimum=8, every=25, slowdown=slowdown)
    sizes = run(policy, 8, 400, noise=1e6, speed=lambda size: 1000 * loss ** math.log2(size / 8))
    assert changes(sizes) == [(8, 16), (16, 32), (32, 64), (64, 128), (128, 256)]


def test_a_growth_on_trial_is_judged_before_the_next():
    policy = GradientNoiseScale(maximum=1024, minimum=8, every=2)
    sizes = run(policy, 8, 300, noise=1e6, speed=lambda size: 1000.0 if size <= 16 else 300.0)
    assert max(sizes) == 32


@pytest.mark.parametrize("steps", [45, 60, 100])  # on trial, and after
def test_the_state_of_a_trial_goes_on(steps: int):
    def speed(size: int) -> float:
        return 1000.0 if size <= 8 else 100.0

    policy = GradientNoiseScale(maximum=64, minimum=8, every=40)
    size = run(policy, 8, steps, noise=1e6, speed=speed)[-1]
    resumed = GradientNoiseScale(maximum=64, minimum=8, every=40)
    resumed.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    rest = run(policy, size, 100, noise=1e6, seed=3, speed=speed)
    assert run(resumed, size, 100, noise=1e6, seed=3, speed=speed) == rest
    assert rest[-1] == 8


def test_a_state_without_speeds_is_taken():
    policy = GradientNoiseScale(maximum=64)
    state = policy.state_dict()
    del state["speed"]
    policy.load_state_dict(state)
    assert policy.speed.ceiling is None


def test_its_state_goes_on():
    whole, part = (GradientNoiseScale(maximum=512, every=30) for _ in range(2))
    whole.first(8), part.first(8)
    run(part, 8, 20, noise=100)
    fresh = GradientNoiseScale(maximum=512, every=30)
    fresh.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert run(fresh, 8, 40, noise=100, seed=5) == run(part, 8, 40, noise=100, seed=5)
    assert fresh.state_dict() == part.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maximum": 0}, "maximum"),
        ({"maximum": 8, "minimum": 16}, "maximum must be at least minimum"),
        ({"maximum": 8, "minimum": 0}, "minimum"),
        ({"maximum": 8, "every": 0}, "every must be a whole number of steps"),
        ({"maximum": 8, "smoothing": 1.0}, "smoothing"),
        ({"maximum": 8, "slowdown": 0}, "slowdown must be a share of samples/s"),
        ({"maximum": 8, "slowdown": 1.5}, "got 1.5"),
        ({"maximum": 8, "slowdown": True}, "got True"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        GradientNoiseScale(**arguments)
