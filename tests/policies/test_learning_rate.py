"""The factors of the learning-rate multiplier on synthetic signals of known truth."""

from __future__ import annotations

import json
import math
import random

import pytest

from adaptrain.policies.learning_rate import (
    Align,
    Batch,
    Cap,
    Guard,
    Journal,
    LossPlateau,
    MetricPlateau,
    Multiplier,
    Recover,
    Signal,
)


def noisy(level: float, spread: float, count: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [level + rng.gauss(0, spread) for _ in range(count)]


# align


def falling(count: int, *, by: float = 0.01) -> list[float]:
    return [2.0 - by * step for step in range(count)]


def test_align_raises_where_gradients_surely_agree_and_says_nothing_before():
    align = Align(rise=0.5)
    for value, loss in zip(noisy(0.05, 0.01, 4), falling(4), strict=True):
        assert align.observe(value, loss=loss) == 0
    assert align.value == 1.0
    assert align.observe(0.05, loss=1.9) == 1
    assert math.log(align.value) == pytest.approx(0.5)


@pytest.mark.parametrize(("fresh", "log"), [(True, 1.5), (False, 0.5)])
def test_align_raises_fresh_weights_faster_where_gradients_hardly_differ(fresh, log):
    align = Align(rise=0.5, fresh=fresh)
    for value in noisy(0.3, 0.01, 5):
        align.observe(value)
    assert math.log(align.value) == pytest.approx(log)


@pytest.mark.parametrize(
    ("fresh", "headroom", "raised"), [(True, 1.0, math.exp(1.5)), (False, 9.0, 1.0), (False, 20.0, 20.0)]
)
def test_align_takes_a_hint_where_the_loss_stands_still_and_little_can_be_lost(fresh, headroom, raised):
    hint = [0.06, -0.02, 0.05, -0.01, 0.06, 0.0, 0.04, -0.01]  # 1.8 standard errors above 0
    still, better = Align(fresh=fresh), Align(fresh=fresh)
    for value, flat, loss in zip(hint, noisy(2.0, 0.01, 8), falling(8), strict=True):
        assert still.observe(value, loss=flat, headroom=headroom) == 0  # raised, but not for sure
        better.observe(value, loss=loss, headroom=headroom)
    assert still.value == pytest.approx(raised)
    assert better.value == 1.0


@pytest.mark.parametrize(
    ("fresh", "first", "headroom", "raised"),
    [
        (True, True, 1.4, math.exp(0.5)),
        (True, True, 9.0, 9.0),
        (True, False, 9.0, math.exp(0.5)),
        (True, False, 200.0, 200.0),
        (False, True, 9.0, math.exp(0.5)),
        (False, True, 200.0, 200.0),
    ],
)
def test_align_goes_to_the_cap_at_once_where_it_is_far_or_training_begins(fresh, first, headroom, raised):
    align = Align(rise=0.5, fresh=fresh)
    if not first:
        for value in (0.03, -0.03) * 20:
            align.observe(value)
        assert align.value == 1.0
    for value in noisy(0.05, 0.01, 5):
        align.observe(value, headroom=headroom)
    assert align.value == pytest.approx(raised)


@pytest.mark.parametrize(
    ("mean", "headroom", "loss", "raised"),
    [
        (0.01, 4.0, 0.69, math.exp(0.5)),
        (0.01, 1.4, 0.69, 1.0),  # steps are as long as is safe
        (-0.01, 4.0, 0.69, 1.0),
        (0.01, 4.0, 0.67, 1.0),  # something is learned
    ],
)
def test_align_raises_trained_weights_on_little_as_long_as_nothing_is_learned(mean, headroom, loss, raised):
    """Gradients as measured on MiniLM, at a tenth of its best rate: 0.01, with a spread of 0.03."""
    align = Align()
    cosines = [mean + each for each in (0.03, -0.03) * 8]
    losses = [*noisy(0.69, 0.005, 8), *noisy(loss, 0.005, 8, 1)]
    for value, each in zip(cosines, losses, strict=True):
        assert align.observe(value, loss=each, headroom=headroom) == 0
    assert align.value == pytest.approx(raised)


def test_align_that_saw_the_loss_fall_does_not_take_a_later_stand_for_the_beginning():
    align = Align()
    for value, loss in zip((0.04, -0.02) * 12, [*noisy(0.69, 0.005, 8), *noisy(0.5, 0.005, 16, 1)], strict=True):
        align.observe(value, loss=loss, headroom=4.0)
    for value, loss in zip((0.04, -0.02) * 12, noisy(0.69, 0.005, 24, 2), strict=True):  # as after a cut
        align.observe(value, loss=loss, headroom=4.0)
    assert align.value == 1.0


def test_align_begins_at_the_cap_on_a_mean_above_zero_and_not_below():
    weak = [0.06, -0.05, 0.07, -0.04, 0.01]  # 0.4 standard errors above 0
    up, down = Align(fresh=True), Align(fresh=True)
    for value in weak:
        assert up.observe(value, headroom=5.0) == 0
        down.observe(-value, headroom=5.0)
    assert up.value == pytest.approx(5.0)
    assert down.value == 1.0


def test_align_finds_agreement_that_is_mostly_noise():
    """As measured on a classifier from scratch at a hundredth of its best rate: 0.036, with a spread of 0.038."""
    align, rng = Align(), random.Random(0)
    for _ in range(100):
        align.observe(rng.gauss(0.036, 0.038), loss=2.07 + rng.gauss(0, 0.02))
    assert align.value > 20


@pytest.mark.parametrize("cosine", [0.0, -0.01, -0.5])
def test_align_leaves_a_good_rate_alone_and_never_lowers_it(cosine):
    """Over 20 runs of 200 samples with the loss falling, the rate stays within a factor of 2 in nearly all."""
    ends = []
    for seed in range(20):
        align = Align()
        for value, loss in zip(noisy(cosine, 0.03, 200, seed), falling(200), strict=True):
            align.observe(value, loss=loss)
            assert align.value >= 1.0
        ends.append(align.value)
    assert sorted(ends)[17] < 2.0


def test_align_takes_back_a_raise_that_went_too_far():
    align = Align()
    align.log = 1.0
    verdicts = [align.observe(value) for value in noisy(-0.05, 0.01, 40)]
    assert align.value == 1.0
    assert set(verdicts) == {0, -1}


def test_align_gives_the_direction_three_steps_to_follow():
    align = Align()
    for value in noisy(0.3, 0.01, 5):
        align.observe(value)
    raised = align.value
    for value in noisy(0.3, 0.01, 3 + 4):
        align.observe(value)
    assert align.value == raised
    align.observe(0.3)
    assert align.value > raised


def test_align_is_calm_after_a_test_without_an_outcome():
    align = Align(patience=20)
    for step, value in enumerate((0.03, -0.03) * 10):
        assert not align.calm, step
        align.observe(value)
    assert align.calm
    align.restart()
    assert not align.calm


def test_align_stops_at_its_ceiling_and_below_half_of_it_after_a_divergence():
    align = Align(ceiling=100.0)
    for _ in range(1000):
        align.observe(0.9)
    assert align.value == pytest.approx(100.0)
    align.relapse()
    assert align.value == pytest.approx(50.0)
    for _ in range(20):
        align.observe(0.9)
    assert align.value == pytest.approx(50.0)


# cap


def test_cap_makes_the_step_as_long_as_kappa_allows():
    cap = Cap(kappa=0.015)
    assert cap.value(1.0) == 1.0
    cap.observe(3.0)
    assert cap.value(1e-3) == 1.0
    factor = cap.value(0.1)
    assert 0.1 * factor * 3.0 == pytest.approx(0.015)
    assert cap.headroom(1e-4) == pytest.approx(50.0)
    assert cap.headroom(0.1) == pytest.approx(factor)
    cap.observe(None)
    assert cap.value(0.1) == 1.0
    assert cap.headroom(0.1) == 1.0  # not known


def test_cap_gives_way_to_evidence_up_to_its_room_and_comes_back():
    cap = Cap(kappa=0.1, room=4.0)
    cap.observe(10.0)
    assert cap.value(1.0) == pytest.approx(0.01)
    cap.adjust(1)
    assert cap.value(1.0) == pytest.approx(0.01 * math.exp(0.25))
    cap.adjust(0)
    cap.adjust(-1)
    assert cap.value(1.0) == pytest.approx(0.01)
    cap.adjust(-1)
    assert cap.value(1.0) == pytest.approx(0.01)
    for _ in range(10):
        cap.adjust(1)
    assert cap.value(1.0) == pytest.approx(0.04)
    cap.relapse()
    for _ in range(10):
        cap.adjust(1)
    assert cap.value(1.0) == pytest.approx(0.02)


def test_a_cap_of_ones_own_never_gives_way():
    cap = Cap(kappa=0.1)
    cap.observe(10.0)
    cap.adjust(1)
    assert cap.value(1.0) == pytest.approx(0.01)


# plateau


def test_plateau_leaves_a_falling_loss_alone():
    plateau = LossPlateau()
    losses = [3.0 - step / 500 + noise for step, noise in enumerate(noisy(0, 0.05, 1000))]
    assert not any(plateau.observe(loss, rate=1e-3, cosine=0.0) for loss in losses)
    assert plateau.value == 1.0


def test_plateau_halves_where_the_loss_stands_still():
    plateau = LossPlateau()
    steps = [step for step, loss in enumerate(noisy(2.0, 0.1, 1000)) if plateau.observe(loss, rate=1.0, cosine=0.0)]
    assert steps
    assert steps[0] >= 149  # one window to compare with, and two flat ones
    assert plateau.value == pytest.approx(0.5 ** len(steps))


def test_plateau_halves_at_once_where_the_loss_rises_surely():
    plateau = LossPlateau()
    losses = noisy(2.0, 0.1, 50) + noisy(2.5, 0.1, 50, seed=1)
    halved = [plateau.observe(loss, rate=1.0, cosine=0.5) for loss in losses]
    assert halved.index(True) == 99


def test_plateau_waits_while_gradients_still_agree():
    plateau = LossPlateau()
    assert not any(plateau.observe(2.0, rate=1.0, cosine=0.3) for _ in range(1000))


def test_plateau_is_off_while_the_schedule_anneals_unless_told_otherwise():
    rates = [1.0 - step / 1000 for step in range(1000)]
    auto, always = LossPlateau(), LossPlateau(anneal=True)
    losses = noisy(2.0, 0.1, 1000)
    assert not any(auto.observe(loss, rate=rate, cosine=0.0) for loss, rate in zip(losses, rates, strict=True))
    assert any(always.observe(loss, rate=rate, cosine=0.0) for loss, rate in zip(losses, rates, strict=True))


def test_plateau_judges_between_the_steps_of_a_staircase():
    plateau = LossPlateau()
    rates = [1.0 if step < 75 else 0.1 for step in range(400)]
    halved = [
        plateau.observe(loss, rate=rate, cosine=0.0) for loss, rate in zip(noisy(2, 0.1, 400), rates, strict=True)
    ]
    assert halved.index(True) >= 75 + 149


def test_plateau_never_falls_below_its_floor():
    plateau = LossPlateau(floor=0.01)
    for loss in noisy(2.0, 0.1, 20_000):
        plateau.observe(loss, rate=1.0, cosine=None)
    assert plateau.value == pytest.approx(0.01)


@pytest.mark.parametrize(("mode", "sign"), [("min", -1.0), ("max", 1.0)])
def test_metric_plateau_halves_after_its_patience(mode, sign):
    plateau = MetricPlateau(mode=mode, patience=2)
    improving = [sign * value for value in (0.5, 0.6, 0.7)]
    assert not any(plateau.observe(value) for value in improving)
    assert [plateau.observe(improving[-1]) for _ in range(3)] == [False, False, True]
    assert plateau.value == 0.5


def test_metric_plateau_takes_a_metric_that_is_not_finite_for_no_improvement():
    plateau = MetricPlateau(mode="min", patience=1)
    assert [plateau.observe(value) for value in (math.nan, 1.0, math.nan, math.nan)] == [False, False, False, True]
    assert plateau.best == -1.0


# batch


@pytest.mark.parametrize(("scaling", "expected"), [("sqrt", 2.0), ("linear", 4.0), (None, 1.0)])
def test_batch_scales_with_the_size_over_a_ramp(scaling, expected):
    batch = Batch(scaling=scaling)
    batch.change(32, 128)
    values = []
    for _ in range(30):
        batch.step()
        values.append(batch.value)
    assert values[-1] == pytest.approx(expected)
    assert values[9] == pytest.approx(math.sqrt(expected))
    assert values == sorted(values)


def test_batch_that_comes_back_scales_back_to_one():
    batch = Batch(scaling="sqrt")
    for old, new in ((32, 64), (64, 128), (128, 32)):
        batch.change(old, new)
        for _ in range(7):  # in mid-ramp
            batch.step()
    for _ in range(20):
        batch.step()
    assert batch.value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("noise_scale", "expected"),
    [(0.0, 1.0), (32.0, 2 / 1.25), (1e9, 4.0), (math.inf, 4.0), (None, 4.0)],  # none measured: in proportion
)
def test_adascale_gains_what_the_noise_scale_allows(noise_scale, expected):
    batch = Batch(scaling="adascale")
    batch.change(32, 128, noise_scale=noise_scale)
    for _ in range(20):
        batch.step()
    assert batch.value == pytest.approx(expected)
    assert 1 <= batch.value <= 4
    batch.change(128, 64)  # by the noise scale it knows
    for _ in range(20):
        batch.step()
    known = math.inf if noise_scale is None else noise_scale
    assert batch.value == pytest.approx(2.0 if math.isinf(known) else (1 + known / 32) / (1 + known / 64))


# recover


def test_recover_rises_by_the_removed_share_of_the_rewind_and_comes_back():
    recover = Recover(limit=4.0)
    top = recover.open(removed=0.5, peak_over_now=10.0, window=100)
    values = [recover.value]
    for _ in range(110):
        recover.step()
        values.append(recover.value)
    assert top == 2.5
    assert values[0] == 1.0
    assert max(values) == values[20] == pytest.approx(2.5)
    assert values[60] == pytest.approx(1.75)
    assert values[100:] == [1.0] * 11


def test_recover_is_one_at_the_peak_of_the_schedule_and_goes_on_from_where_it_is():
    recover = Recover()
    recover.open(removed=0.5, peak_over_now=1.0, window=100)
    recover.step()
    assert recover.value == 1.0
    recover.open(removed=0.5, peak_over_now=4.0, window=100)
    for _ in range(40):
        recover.step()
    before = recover.value
    recover.open(removed=0.1, peak_over_now=4.0, window=100)
    assert recover.value == before > 1.5


# guard


def settled(guard: Guard, count: int = 200) -> Guard:
    assert {guard.observe(loss) for loss in noisy(2.0, 0.05, count)} == {"accept"}
    return guard


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_guard_skips_what_is_not_finite_from_the_first_step(loss):
    assert Guard().observe(loss) == "non_finite"
    assert Guard().observe(1.0, gradients_finite=False) == "non_finite"


def test_guard_skips_a_spike_and_only_upward():
    guard = settled(Guard())
    assert guard.observe(3.0) == "spike"
    assert guard.observe(0.5) == "accept"
    assert guard.observe(2.1) == "accept"


def test_guard_judges_no_spike_before_it_knows_the_losses():
    guard = Guard()
    assert {guard.observe(loss) for loss in [*noisy(2.0, 0.05, 30), 50.0]} == {"accept"}


def test_guard_leaves_the_heavy_tail_of_a_small_loss_alone():
    rng = random.Random(0)
    guard = Guard()
    guard.initial = math.log(3)  # of a classifier of three classes
    losses = [math.exp(rng.gauss(-5, 1.2)) for _ in range(5000)]
    assert sum(guard.observe(loss) != "accept" for loss in losses) <= 2


def test_guard_is_not_blinded_by_a_loss_that_fell_by_orders_of_magnitude():
    guard = Guard()
    assert {guard.observe(math.exp(-step / 20)) for step in range(128)} == {"accept"}
    assert guard.observe(20.0) == "spike"


def test_guard_skips_no_more_than_four_spikes_of_128_steps():
    guard = settled(Guard())
    guard.kept()
    guard.initial = 10.0  # far from lost: not a divergence
    verdicts = [guard.observe(2.6) if step % 4 == 0 else guard.observe(2.0) for step in range(400)]
    assert 0 < verdicts.count("spike") <= 16
    assert "diverged" not in verdicts


def test_guard_sees_divergence_in_five_bad_steps_of_eight():
    guard = settled(Guard())
    verdicts = [guard.observe(loss) for loss in (9.0, math.nan, 2.0, 9.0, 9.0, 9.0)]
    assert verdicts == ["spike", "non_finite", "accept", "spike", "spike", "diverged"]


def test_guard_sees_a_creeping_divergence():
    guard = Guard()
    for loss in noisy(5.0, 0.05, 32) + noisy(2.0, 0.05, 168, seed=1):
        assert guard.observe(loss) == "accept"
    guard.kept()
    creeping = [2.0 + 0.01 * step + noise for step, noise in enumerate(noisy(0, 0.05, 400, seed=2))]
    verdicts = [guard.observe(loss) for loss in creeping]
    assert "diverged" in verdicts
    assert creeping[verdicts.index("diverged")] < 4.5


def test_guard_leaves_a_noisy_falling_loss_alone():
    rng = random.Random(0)
    guard = Guard()
    losses = [2 + 6 * math.exp(-step / 300) + rng.gauss(0, 0.3) for step in range(5000)]
    for loss in losses:
        assert guard.observe(loss) == "accept"
        if guard.snapshot_due(loss):
            guard.kept()


def test_guard_wants_a_snapshot_after_a_calm_stretch_and_of_an_ordinary_loss():
    guard = settled(Guard(quiet=100), 99)
    assert not guard.snapshot_due(2.0)
    guard.observe(2.0)
    assert guard.snapshot_due(2.0)
    assert not guard.snapshot_due(2.5)
    guard.kept()
    assert not guard.snapshot_due(2.0)


def test_guard_cuts_deeper_at_each_rollback_and_regrows():
    guard = Guard(quiet=100)
    guard.rolled_back()
    assert guard.value == 0.5
    for loss in noisy(2.0, 0.05, 250):
        guard.observe(loss)
    assert guard.value == pytest.approx(1.0)
    guard.rolled_back()
    assert guard.value == pytest.approx(0.25)
    for loss in noisy(2.0, 0.05, 400):
        guard.observe(loss)
    assert guard.value == pytest.approx(0.5)  # half of the value it diverged at
    assert not guard.exhausted
    guard.rolled_back()
    assert guard.exhausted


# together


def test_multiplier_bounds_the_product_and_then_scales_by_the_batch():
    multiplier = Multiplier(align=Align(ceiling=1e6), batch=Batch(scaling="linear"))
    for _ in range(500):
        multiplier.step(Signal(loss=1.0, rate=1e-3, probed=1, cosine=1.0))
    assert multiplier.value == pytest.approx(1000.0)
    multiplier.batch_changed(8, 16)
    for _ in range(20):
        multiplier.step(Signal(loss=1.0, rate=1e-3))
    assert multiplier.value == pytest.approx(2000.0)


@pytest.mark.parametrize(("rates", "raised"), [("constant", True), ("warm-up", False), ("annealed", False)])
def test_align_does_not_work_against_a_schedule_that_is_low_on_purpose(rates, raised):
    multiplier = Multiplier(align=Align())
    made = {
        "constant": [1e-3] * 60,
        "warm-up": [1e-5 * step for step in range(1, 61)],
        "annealed": [1e-3] + [4e-4] * 59,
    }[rates]
    for rate in made:
        multiplier.step(Signal(loss=1.0, rate=rate, probed=1, cosine=0.5))
    assert (multiplier.factors["align"] > 1) == raised
    assert multiplier.is_searching == raised


@pytest.mark.parametrize(("fresh", "base", "first"), [(True, 4e-4, 9), (True, None, 5), (False, 4e-4, None)])
def test_fresh_weights_begin_at_the_cap_once_an_eighth_of_the_warm_up_is_over(fresh, base, first):
    multiplier = Multiplier(align=Align(fresh=fresh), cap=Cap(kappa=0.1))
    raised = []
    for step in range(1, 41):
        cosine = 0.05 + 0.01 * (-1) ** step
        multiplier.step(Signal(loss=1.0, rate=1e-5 * step, base=base, probed=1, cosine=cosine, ratio=1.0))
        raised += [step] * (multiplier.factors["align"] > 1)
    assert (raised or [None])[0] == first
    if first is not None:
        assert multiplier.value * 4e-4 == pytest.approx(0.1)  # the cap, which warm-up runs into


def test_a_binding_cap_takes_back_the_raise_down_to_four_times_what_it_allows():
    multiplier = Multiplier(align=Align(), cap=Cap(kappa=0.015))
    for _ in range(60):
        multiplier.step(Signal(loss=1.0, rate=1e-3, probed=1, cosine=0.5, ratio=1.0))
    assert multiplier.factors["align"] > 10
    for _ in range(60):
        multiplier.step(Signal(loss=1.0, rate=1e-3, probed=1, cosine=0.0, ratio=1e3))
    assert multiplier.factors["align"] == 1.0
    assert multiplier.value * 1e-3 * 1e3 == pytest.approx(0.015, rel=1e-2)
    multiplier.align = align = Align()
    align.log = math.log(100)
    for _ in range(100):  # alone, the rate would be 2 times what the cap allows
        multiplier.step(Signal(loss=1.0, rate=1e-3, probed=1, cosine=0.0, ratio=30.0))
    assert align.value == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    ("cosine", "rate", "limit"),
    [
        (0.5, 1.0, 0.4),  # gradients agree although the cap binds: gives way, up to its room
        (0.0, 1.0, 0.1),
        (0.5, 1e-6, None),  # far below the cap, a thousandfold is not enough: there is nothing to give way
    ],
)
def test_a_binding_cap_gives_way_where_gradients_agree(cosine, rate, limit):
    multiplier = Multiplier(align=Align(), cap=Cap(kappa=0.1, room=4.0))
    for step in range(120):
        multiplier.step(Signal(loss=1.0, rate=rate, probed=1, cosine=cosine + 0.01 * (-1) ** step, ratio=1.0))
    assert multiplier.cap is not None
    if limit is None:
        assert multiplier.value > 10
        assert multiplier.cap.slack == 0
    else:
        assert rate * multiplier.value == pytest.approx(limit)


@pytest.mark.parametrize("base", [1.0, None])
@pytest.mark.parametrize(("annealed", "tail"), [(1.0, [0.05, 0.01]), (0.25, [0.1, 0.04])])
def test_a_rate_that_is_annealed_is_annealed_under_a_binding_cap_too(base, annealed, tail):
    multiplier = Multiplier(cap=Cap(kappa=0.1, annealed=annealed))
    taken = []
    for rate in [0.01, 0.1, 0.5, *[1.0] * 10, 0.5, 0.1, 0.0]:
        multiplier.step(Signal(loss=1.0, rate=rate, base=base, probed=1, cosine=0.0, ratio=1.0))
        taken.append(rate * multiplier.value)
    assert taken == pytest.approx([0.01, *[0.1] * 12, *tail, 0.0])


def test_a_spike_in_the_schedule_is_capped_and_leaves_no_trace_where_the_schedule_says_what_it_warms_up_to():
    multiplier = Multiplier(align=Align(), cap=Cap(kappa=0.1))
    taken = []
    for rate in [0.2, 0.2, 2.0, 2.0, 0.2, 0.1]:
        multiplier.step(Signal(loss=1.0, rate=rate, base=0.2, probed=1, cosine=0.0, ratio=1.0))
        taken.append(rate * multiplier.value)
    assert taken == pytest.approx([0.1] * 5 + [0.05])
    assert not multiplier.is_low_on_purpose


def test_recovering_undoes_annealing_under_a_binding_cap_but_goes_no_higher():
    multiplier = Multiplier(cap=Cap(kappa=0.1), recover=Recover())
    taken = []
    for step in range(60):
        multiplier.step(Signal(loss=1.0, rate=1.0 if step == 0 else 0.25, probed=1, cosine=0.0, ratio=1.0))
        taken.append((1.0 if step == 0 else 0.25) * multiplier.value)
        if step == 9:
            multiplier.structure_changed(0.9, window=20)
    assert taken[9] == pytest.approx(0.025)
    assert 0.05 < max(taken[10:]) <= 0.1 + 1e-9
    assert taken[-1] == pytest.approx(0.025)


def test_a_cap_that_gave_way_before_a_divergence_gives_way_half_as_far_after_it():
    multiplier = Multiplier(align=Align(), cap=Cap(kappa=0.1, room=4.0), guard=Guard())
    for again in (False, True):
        for _ in range(200):
            multiplier.step(Signal(loss=1.0, rate=1.0, probed=1, cosine=0.5, ratio=1.0))
        assert multiplier.cap is not None
        assert math.exp(multiplier.cap.slack) == pytest.approx(2.0 if again else 4.0)
        multiplier.rolled_back()


def test_a_skipped_step_moves_no_factor():
    multiplier = Multiplier(align=Align(), guard=Guard(), batch=Batch())
    multiplier.batch_changed(8, 32)
    assert multiplier.step(Signal(loss=math.nan, rate=1e-3, probed=1, cosine=0.9)) == "non_finite"
    assert multiplier.value == 1.0


def test_every_state_survives_json_in_mid_run():
    def build() -> Multiplier:
        return Multiplier(
            align=Align(), cap=Cap(), plateau=LossPlateau(), batch=Batch(), recover=Recover(), guard=Guard()
        )

    def feed(multiplier: Multiplier, begin: int, end: int) -> list[float]:
        values = []
        for step in range(begin, end):
            loss = math.nan if step == 140 else 2 + random.Random(step).gauss(0, 0.1)
            if step == 95:
                multiplier.batch_changed(8, 16)
                multiplier.structure_changed(0.3, window=50)
            rate = 1e-3 if step < 90 else 5e-4
            probed = 4 * (step % 4 == 0)
            ratio = 20 + random.Random(-step).random() if probed else None
            multiplier.step(Signal(loss=loss, rate=rate, probed=probed, cosine=0.1, ratio=ratio))
            values.append(multiplier.value)
        return values

    whole = feed(build(), 0, 300)
    first = build()
    begin = feed(first, 0, 103)
    second = build()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begin + feed(second, 103, 300) == whole
    assert len(set(whole)) > 10


def test_journal_records_a_long_way_in_few_lines_that_name_the_factor():
    journal = Journal()
    lines = []
    for step in range(2000):
        value = math.exp(min(4.6, step / 200))
        if (move := journal.observe(step, value, {"align": value, "cap": 1.0})) is not None:
            lines.append(move)
    assert 10 < len(lines) <= 50
    assert all(reason.startswith("align:") for _, reason in lines)
    assert lines[0][0] == 1.0


def test_journal_is_silent_about_jitter_and_shows_another_factor_soon():
    journal = Journal()
    assert all(
        journal.observe(step, 1 + 0.05 * (-1) ** step, {"cap": 1 + 0.05 * (-1) ** step}) is None for step in range(99)
    )
    assert journal.observe(100, 0.5, {"cap": 0.5, "align": 1.0}) is not None
    assert journal.observe(106, 0.3, {"cap": 0.3, "align": 1.0}) is None
    old, reason = journal.observe(106, 2.0, {"cap": 0.5, "align": 4.0}) or (0, "")
    assert old == 0.5
    assert reason.startswith("align")
