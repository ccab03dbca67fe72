from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from adaptrain.policies.batch_size import Forecast, MicroBatchSizePolicy


def no_limit(size: int) -> Forecast:
    return Forecast()


def limited(most: int) -> Callable[[int], Forecast]:
    return lambda size: Forecast(predicted_gib=float(size), limit_gib=float(most))


def run(policy: MicroBatchSizePolicy, steps: int, speed, forecast=no_limit, batch: int = 64) -> list[int]:
    """The sizes that were used, one per step."""
    used = []
    for _ in range(steps):
        policy.begin(batch)
        used.append(policy.size)
        policy.observe(batch_size=batch, samples_per_s=speed(policy.size), forecast=forecast)
    return used


def visited(sizes: list[int]) -> list[int]:
    return [size for number, size in enumerate(sizes) if number == 0 or size != sizes[number - 1]]


def test_it_begins_small_and_doubles_while_larger_is_faster() -> None:
    policy = MicroBatchSizePolicy()
    first = policy.begin(64)
    assert (first.old, first.new) == (64, 8)
    assert "begins small" in first.reason
    assert visited(run(policy, 60, lambda size: float(size))) == [8, 16, 32, 64]
    assert not policy.is_searching


def test_it_settles_on_the_smallest_within_two_percent() -> None:
    speeds = {4: 50.0, 8: 98.5, 16: 99.5, 32: 100.0, 64: 99.0}
    policy = MicroBatchSizePolicy()
    sizes = run(policy, 80, speeds.__getitem__)
    assert visited(sizes) == [8, 16, 32, 64, 4, 8]
    assert policy.size == 8


def test_it_looks_below_where_it_began() -> None:
    policy = MicroBatchSizePolicy()
    run(policy, 80, lambda size: 100.0 / size)
    assert policy.size == 1


def test_a_much_slower_size_ends_the_way_up() -> None:
    policy = MicroBatchSizePolicy()
    assert 64 not in run(policy, 80, {4: 10.0, 8: 100.0, 16: 101.0, 32: 50.0}.__getitem__)
    assert policy.size == 8


def test_a_size_predicted_above_the_limit_is_never_tried() -> None:
    policy = MicroBatchSizePolicy()
    assert max(run(policy, 400, lambda size: float(size), limited(20))) == 16
    assert policy.size == 16


def test_the_median_ignores_a_hiccup() -> None:
    policy, count = MicroBatchSizePolicy(), 0

    def speed(size: int) -> float:
        nonlocal count
        count += 1
        return 1.0 if count % 5 == 0 else float(size)

    run(policy, 80, speed)
    assert policy.size == 64


def test_the_short_last_batch_does_not_count() -> None:
    policy = MicroBatchSizePolicy()
    policy.begin(64)
    for _ in range(20):
        policy.observe(batch_size=5, samples_per_s=1.0, forecast=no_limit)
    assert policy.state_dict()["trials"] == {}


def test_an_error_while_searching_settles_below() -> None:
    policy = MicroBatchSizePolicy()
    run(policy, 14, lambda size: float(size))
    assert policy.size == 32
    proposal = policy.out_of_memory(32)
    assert (proposal.old, proposal.new) == (32, 16)
    assert "ran out at 32" in proposal.reason
    run(policy, 40, lambda size: float(size))
    assert policy.size == 16


def test_an_error_at_the_very_first_step_goes_on_searching_below() -> None:
    policy = MicroBatchSizePolicy()
    policy.begin(64)
    policy.out_of_memory(8)
    assert policy.size == 4
    assert max(run(policy, 40, lambda size: float(size))) == 4


def test_it_grows_back_in_small_steps_after_quiet_ones_until_the_ceiling() -> None:
    policy = MicroBatchSizePolicy(fixed=16, growth_interval=10)
    policy.begin(64)
    assert policy.out_of_memory(16).new == 8
    sizes = visited(run(policy, 200, lambda size: 1.0))
    assert sizes == [8, 10, 12, 14, 16]
    assert policy.size == 16


def test_a_ceiling_is_kept_longer_after_each_error() -> None:
    def errors(steps: int) -> int:
        policy, count = MicroBatchSizePolicy(fixed=16, growth_interval=10), 0
        policy.begin(64)
        for _ in range(steps):
            while policy.size >= 16:  # never fits
                policy.out_of_memory(policy.size)
                count += 1
            policy.observe(batch_size=64, samples_per_s=None, forecast=no_limit)
        return count

    assert errors(1000) <= 8
    assert errors(10000) - errors(9000) <= 2


def test_growing_waits_until_it_is_predicted_to_fit() -> None:
    policy = MicroBatchSizePolicy(fixed=16, growth_interval=10)
    policy.begin(64)
    policy.out_of_memory(16)
    assert max(run(policy, 100, lambda size: 1.0, limited(12))) == 12
    assert max(run(policy, 100, lambda size: 1.0, no_limit)) == 16


def test_it_searches_on_when_memory_frees() -> None:
    policy = MicroBatchSizePolicy(growth_interval=10)
    run(policy, 40, lambda size: float(size), limited(20))
    assert policy.size == 16
    run(policy, 200, lambda size: float(size), no_limit)
    assert policy.size == 64


def test_it_never_proposes_no_change_and_never_leaves_the_range() -> None:
    policy = MicroBatchSizePolicy(growth_interval=3)
    policy.begin(48)
    for step in range(2000):
        proposal = policy.observe(batch_size=48, samples_per_s=float(step * 7919 % 13 + 1), forecast=limited(step % 60))
        if step % 17 == 0 and policy.size > 1:
            proposal = policy.out_of_memory(policy.size)
        assert 1 <= policy.size <= 48
        assert proposal is None or (proposal.old != proposal.new and proposal.new == policy.size)


def test_a_fixed_size_is_said_once_and_not_searched() -> None:
    policy = MicroBatchSizePolicy(fixed=8)
    assert policy.begin(64).new == 8
    assert policy.begin(64) is None
    assert set(run(policy, 50, lambda size: float(size))) == {8}
    assert MicroBatchSizePolicy(fixed=64).begin(64) is None


def test_restart_searches_from_the_size_it_has() -> None:
    policy = MicroBatchSizePolicy()
    run(policy, 80, lambda size: float(size))
    policy.restart()
    assert policy.is_searching
    assert policy.size == 64
    run(policy, 80, lambda size: 1.0 / size)
    assert policy.size == 1


@pytest.mark.parametrize("at", [0, 3, 9, 17, 40])
def test_the_state_is_plain_and_goes_on_alike(at: int) -> None:
    def speed(size: int) -> float:
        return 100.0 - abs(size - 16)

    straight, first, second = MicroBatchSizePolicy(), MicroBatchSizePolicy(), MicroBatchSizePolicy()
    expected = visited(run(straight, 90, speed))
    before = run(first, at, speed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    # The first step of a new process is slow and does not count: a search may take one step longer.
    assert visited(before + run(second, 90 - at, speed)) == expected
