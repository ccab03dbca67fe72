from __future__ import annotations

import math

import pytest

from adaptrain import Budget, ConfigurationError, Progress


def test_no_limit_by_default():
    assert Budget().target == {}
    assert set(Budget().asdict().values()) == {None}


def test_the_target_holds_only_limits_on_the_final_model():
    budget = Budget(memory_gib=4, wall_clock_min=30, latency=0.5, params_m=2)
    assert budget.target == {"latency": 0.5, "params_m": 2}


@pytest.mark.parametrize("name", ["latency", "params", "flops", "memory"])
@pytest.mark.parametrize("value", [1.7, 0, -0.1, math.nan, math.inf, "half", True])
def test_a_fraction_outside_its_range_names_itself_and_the_value(name, value):
    with pytest.raises(ConfigurationError, match=rf"budget\.{name} .*got {value!r}"):
        Budget(**{name: value})


@pytest.mark.parametrize("name", ["memory_gib", "wall_clock_min", "latency_ms", "params_m", "trainable_params_m"])
@pytest.mark.parametrize("value", [0, -1, math.nan, "4GB"])
def test_an_absolute_limit_must_be_positive(name, value):
    with pytest.raises(ConfigurationError, match=rf"budget\.{name} must be .*got {value!r}"):
        Budget(**{name: value})


def test_a_fraction_above_one_points_to_the_absolute_limit():
    with pytest.raises(ConfigurationError, match=r"use budget\.latency_ms"):
        Budget(latency=12)


def test_a_whole_is_a_fraction():
    assert Budget(latency=1).target == {"latency": 1}


@pytest.mark.parametrize(
    ("step", "elapsed_s", "expected"), [(0, 0, 0.0), (50, 0, 0.5), (10, 90, 0.9), (90, 10, 0.9), (500, 0, 1.0)]
)
def test_progress_is_the_larger_share(step, elapsed_s, expected):
    assert Progress(total_steps=100, wall_clock_s=100).fraction(step=step, elapsed_s=elapsed_s) == expected


def test_progress_without_a_limit_stays_at_zero():
    assert Progress().fraction(step=10**9, elapsed_s=1e9) == 0.0


@pytest.mark.parametrize("limits", [{"total_steps": 0}, {"wall_clock_s": -1.0}])
def test_a_limit_of_nothing_is_refused(limits):
    with pytest.raises(ConfigurationError, match="greater than 0"):
        Progress(**limits)
