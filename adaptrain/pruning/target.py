"""What the final model may cost, as a user states it and as absolute limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptrain.budget import ABSOLUTES, FRACTIONS, Budget
from adaptrain.errors import ConfigurationError

_ABSOLUTE_OF = {"latency_ms": ("latency", 1.0), "params_m": ("params", 1e6)}  # name -> cost, unit


def read_target(target: Mapping[str, Any]) -> dict[str, float]:
    """Returns the limits that were given, by name; entries of None are left out.

    Args:
        target: Fractions of the dense model in (0, 1] (`latency`, `params`, `flops`, `memory`), or absolute limits
            (`latency_ms` in milliseconds, `params_m` in millions).

    Raises:
        ConfigurationError: An unknown name, or a value out of its range.
    """
    names = FRACTIONS + ABSOLUTES
    if not isinstance(target, Mapping):
        raise ConfigurationError(f"The pruning target must be a mapping such as {{'latency': 0.5}}, got {target!r}.")
    if unknown := [str(name) for name in target if name not in names]:
        raise ConfigurationError(
            f"The pruning target does not know {', '.join(unknown)}; it knows {', '.join(names)}."
            " Half of the dense model's latency is target={'latency': 0.5}."
        )
    return Budget(**target).target


def cost_name(name: str) -> str:
    """Returns the cost that a limit is about: `latency_ms` limits `latency`."""
    return _ABSOLUTE_OF.get(name, (name, 1.0))[0]


def absolute_limit(name: str, value: float, dense: float) -> float:
    """Returns a limit in the unit of the cost it is about.

    Args:
        name: The limit's name.
        value: The limit as given.
        dense: The dense model's cost.
    """
    return value * _ABSOLUTE_OF[name][1] if name in _ABSOLUTE_OF else value * dense


def in_given_unit(name: str, cost: float, dense: float) -> float:
    """Returns a cost in the unit that its limit was given in."""
    return cost / _ABSOLUTE_OF[name][1] if name in _ABSOLUTE_OF else cost / dense


def absolute_limits(target: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """Returns the tightest absolute limit on each cost; those that the dense model meets are left out.

    Args:
        target: The limits as `read_target` returns them.
        dense: The dense model's costs by name.
    """
    limits: dict[str, float] = {}
    for name, value in target.items():
        cost = cost_name(name)
        limit = absolute_limit(name, value, dense[cost])
        if limit < limits.get(cost, dense[cost]):
            limits[cost] = limit
    return limits
