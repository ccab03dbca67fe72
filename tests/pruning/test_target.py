from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from adaptrain import ConfigurationError
from adaptrain.pruning.target import absolute_limits, in_given_unit, read_target


def test_nulls_are_no_limit_and_yaml_is_read() -> None:
    assert read_target(OmegaConf.create({"latency": 0.5, "params": None, "latency_ms": None})) == {"latency": 0.5}
    assert read_target({}) == {}


@pytest.mark.parametrize(
    ("target", "seen"),
    [
        ({"latency": 1.7}, "1.7"),
        ({"params_m": -1}, "-1"),
        ({"flops": "half"}, "half"),
        ({"speed": 0.5}, "speed"),
        ({"memory_gib": 4}, "memory_gib"),
        (0.5, "0.5"),
    ],
)
def test_wrong_targets_are_refused_with_what_was_seen(target, seen) -> None:
    with pytest.raises(ConfigurationError, match=seen):
        read_target(target)


def test_the_tightest_limit_on_a_cost_holds() -> None:
    dense = {"latency": 10.0, "params": 4e6, "flops": 100.0, "memory": 1.0}
    assert absolute_limits({"latency": 0.5, "latency_ms": 4}, dense) == {"latency": 4}
    assert absolute_limits({"latency": 0.3, "latency_ms": 4}, dense) == {"latency": 3}
    assert absolute_limits({"params_m": 1.5, "flops": 0.25}, dense) == {"params": 1.5e6, "flops": 25}
    assert absolute_limits({"params_m": 9, "latency": 1.0}, dense) == {}
    assert in_given_unit("params_m", 1.5e6, 4e6) == 1.5
    assert in_given_unit("latency", 4.0, 10.0) == 0.4
