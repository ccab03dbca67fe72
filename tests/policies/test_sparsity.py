from __future__ import annotations

import pickle

import pytest

from adaptrain import ConfigurationError, CosineSchedule, CubicSchedule, LinearSchedule, OneShotSchedule


@pytest.mark.parametrize("schedule", [CubicSchedule(), LinearSchedule(), CosineSchedule()])
def test_events_are_spread_evenly_and_the_last_reaches_everything(schedule) -> None:
    plan = schedule.plan()
    assert [event.position for event in plan] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    shares = [event.share for event in plan]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == pytest.approx(1)


def test_cubic_cuts_most_at_first() -> None:
    shares = [event.share for event in CubicSchedule(begin=0, end=1, events=4).plan()]
    assert shares == pytest.approx([1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1])


def test_linear_cuts_equally_and_cosine_most_in_the_middle() -> None:
    assert [event.share for event in LinearSchedule(events=4).plan()] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert [event.share for event in CosineSchedule(events=2).plan()] == pytest.approx([0.5, 1])
    assert CosineSchedule(events=4).plan()[0].share < 0.25


def test_one_event_comes_at_the_beginning() -> None:
    assert CubicSchedule(begin=0.3, end=0.8, events=1).plan() == [(0.3, 1.0)]
    assert OneShotSchedule(at=0.4).plan() == [(0.4, 1.0)]


@pytest.mark.parametrize(
    ("kind", "arguments", "seen"),
    [
        (CubicSchedule, {"begin": -0.1}, "-0.1"),
        (CubicSchedule, {"end": 1.5}, "1.5"),
        (LinearSchedule, {"begin": 0.6, "end": 0.2}, "begin=0.6"),
        (LinearSchedule, {"begin": 0.5, "end": 0.5, "events": 2}, "begin=0.5"),
        (CosineSchedule, {"events": 0}, "0"),
        (CosineSchedule, {"events": 2.5}, "2.5"),
        (OneShotSchedule, {"at": "early"}, "early"),
    ],
)
def test_wrong_values_are_refused_with_what_was_seen(kind, arguments, seen) -> None:
    with pytest.raises(ConfigurationError, match=seen):
        kind(**arguments)


def test_schedules_pickle() -> None:
    assert pickle.loads(pickle.dumps(CubicSchedule(events=3))) == CubicSchedule(events=3)
