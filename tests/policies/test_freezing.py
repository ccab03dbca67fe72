from __future__ import annotations

import json
import random
from typing import Any

import pytest

from adaptrain.policies.freezing import Freezing


def flat(level: float = 1.0, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [level + rng.gauss(0, 0.05) for _ in range(10)]


def make(**changes: Any) -> Freezing:
    return Freezing(6, **({"by": "signal", "most": 4, "begin": 0.1, "end": 0.5} | changes))


def test_a_schedule_freezes_evenly_and_stops_at_most():
    policy = make(by="schedule")
    counts = []
    for tenth in range(10):
        policy.window([1.0] * (6 - policy.frozen), flat(), progress=tenth / 10)
        counts.append(policy.frozen)
    assert counts == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]


def test_the_first_layers_go_as_far_as_they_change_no_more_than_the_median():
    policy = make()
    policy.window([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], flat(), progress=0.2)
    assert policy.frozen == 0  # nothing to compare with yet
    reason = policy.window([1.01, 1.02, 1.5, 1.01, 1.6, 1.7], flat(), progress=0.25)
    assert policy.frozen == 2  # the fourth layer changes as little, but lies above one that changes
    assert "change less" in reason


def test_a_first_layer_that_changes_keeps_all_of_them():
    policy = make()
    policy.window([1.0] * 6, flat(), progress=0.2)
    policy.window([2.0, 1.0, 1.0, 1.0, 1.0, 1.0], flat(), progress=0.25)
    assert policy.frozen == 0


@pytest.mark.parametrize("by", ["signal", "schedule"])
def test_nothing_goes_before_begin_or_while_it_is_held(by):
    policy = make(by=by)
    for _ in range(4):
        policy.window([1.0] * 6, flat(), progress=0.05)
        policy.window([1.0] * 6, flat(), progress=0.9, hold=True)
    assert policy.frozen == 0


def test_a_loss_that_rises_thaws_and_each_time_for_longer():
    policy = make(by="schedule", begin=0.0, end=0.01)
    waits = []
    for _ in range(2):
        while not policy.frozen:
            policy.window([1.0] * 6, flat(), progress=0.5)
        assert "rose" in policy.window([1.0] * 2, flat(2.0), progress=0.5)
        assert policy.frozen == 0
        waits.append(0)
        while not policy.frozen:
            policy.window([1.0] * 6, flat(), progress=0.5)
            waits[-1] += 1
    assert waits == [5, 9]


def test_a_loss_that_stays_keeps_them_frozen():
    policy = make(by="schedule")
    for step in range(20):
        policy.window([1.0] * (6 - policy.frozen), flat(seed=step), progress=0.6)
    assert policy.frozen == 4


@pytest.mark.parametrize("every", [2, 4])
def test_in_turns_they_train_in_one_window_of_some(every):
    policy = make(by="turns", begin=0.2, every=every)
    counts = []
    for step in range(20):
        policy.window([1.0] * (6 - policy.frozen), flat(seed=step), progress=step / 20)
        counts.append(policy.frozen)
    assert counts[:4] == [0] * 4  # what a window decides holds for the next
    assert counts[4:] == ([4] * (every - 1) + [0]) * (16 // every)


def test_in_turns_a_loss_that_rises_lets_them_rest():
    policy = make(by="turns", begin=0.0, every=4)
    policy.window([1.0] * 6, flat(), progress=0.5)
    assert policy.frozen == 4
    assert "rose" in policy.window([1.0] * 2, flat(2.0), progress=0.5)
    counts = []
    for _ in range(5):
        policy.window([1.0] * 6, flat(2.0), progress=0.5)
        counts.append(policy.frozen)
    assert counts == [0] * 4 + [4]


def test_unfreezing_trains_the_last_layers_first():
    policy = make(by="unfreezing", begin=0.2, end=0.6)
    assert policy.start()
    counts = [policy.frozen]
    for tenth in range(10):
        # A loss that rises is none of its business: what is frozen was trained before.
        reason = policy.window([1.0] * (6 - policy.frozen), flat(1.0 + tenth), progress=tenth / 10)
        assert bool(reason) == (policy.frozen != counts[-1])
        counts.append(policy.frozen)
    assert counts == [4, 4, 4, 3, 2, 1, 0, 0, 0, 0, 0]


def test_unfreezing_freezes_nothing_that_is_held_and_others_nothing_at_first():
    policy = make(by="unfreezing")
    assert not policy.start(hold=True)
    assert not make(by="schedule").start()
    policy.window([1.0] * 6, flat(), progress=0.1)
    assert policy.frozen == 0


@pytest.mark.parametrize(("progress", "frozen"), [(0.1, 4), (0.35, 2), (0.9, 0)])
def test_unfreezing_that_joins_later_freezes_what_would_still_be_frozen(progress, frozen):
    policy = make(by="unfreezing", begin=0.2, end=0.6)
    assert bool(policy.start(progress=progress)) == bool(frozen)
    assert policy.frozen == frozen


def test_unfreezing_goes_on_where_it_was_and_freezes_nothing_again():
    first, second = make(by="unfreezing", begin=0.0, end=0.4), make(by="unfreezing", begin=0.0, end=0.4)
    first.start()
    first.window([1.0] * 2, flat(), progress=0.1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.frozen == 2
    second.thaw()
    second.window([1.0] * 6, flat(), progress=0.2)
    assert second.frozen == 0


@pytest.mark.parametrize(("by", "different"), [("signal", 3), ("turns", 2)])
def test_its_state_survives_json(by, different):
    def feed(policy: Freezing, begin: int, end: int) -> list[int]:
        counts = []
        for step in range(begin, end):
            rng = random.Random(step)
            norms = [1 + rng.random() for _ in range(6 - policy.frozen)]
            policy.window(norms, flat(2.0 if step == 12 else 1.0, seed=step), progress=step / 20)
            counts.append(policy.frozen)
        return counts

    whole = feed(make(by=by), 0, 20)
    first, second = make(by=by), make(by=by)
    begin = feed(first, 0, 9)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begin + feed(second, 9, 20) == whole
    assert len(set(whole)) >= different
