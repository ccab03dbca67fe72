"""Which member to take: pure numbers in, a name out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adaptrain.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What one member costs and gives.

    Args:
        name: The member's name.
        metric: Its validation metric; None: not known.
        latency_ms: Milliseconds of a forward pass.
        memory_mib: Peak inference memory, in MiB.
        params_m: Parameters, in millions.
    """

    name: str
    metric: float | None
    latency_ms: float
    memory_mib: float
    params_m: float


_UNITS = {"latency_ms": " ms", "memory_mib": " MiB", "params_m": " M parameters", "metric_at_least": ""}
_LEAST = {"latency_ms": "the fastest", "memory_mib": "the one of least memory", "params_m": "the smallest"}


def select(
    candidates: Sequence[Candidate],
    limits: Mapping[str, float],
    *,
    metric: str = "metric",
    mode: Literal["max", "min"] = "max",
    at: str = "",
) -> str:
    """Returns the best member that meets every limit: by metric, and among equals the fastest.

    Args:
        candidates: The members.
        limits: `latency_ms`, `memory_mib`, `params_m`: at most; `metric_at_least`: at least, or where less is better at
            most.
        metric: The metric's name, for messages.
        mode: Whether more or less of the metric is better.
        at: Where latency and memory were measured, for messages.

    Raises:
        ConfigurationError: No member meets them: it says which limit is out of reach and by how much, or which limits
            exclude each other.
    """
    sign = 1 if mode == "max" else -1

    def excess(name: str, candidate: Candidate) -> float:
        """By how much a member misses a limit, at most 0 where it meets it."""
        if name == "metric_at_least":
            return math.inf if candidate.metric is None else sign * (limits[name] - candidate.metric)
        return getattr(candidate, name) - limits[name]

    def quality(candidate: Candidate) -> tuple[float, ...]:
        known = -math.inf if candidate.metric is None else sign * candidate.metric
        # Without a metric the larger model is taken for the better one.
        return known, candidate.params_m if candidate.metric is None else -candidate.latency_ms

    fitting = [each for each in candidates if all(excess(name, each) <= 0 for name in limits)]
    if fitting:
        return max(fitting, key=quality).name
    for name, limit in limits.items():
        nearest = min(candidates, key=lambda each: excess(name, each))
        if excess(name, nearest) > 0:
            raise ConfigurationError(_out_of_reach(name, limit, nearest, excess(name, nearest), metric, mode, at))
    raise ConfigurationError(_exclusive(candidates, limits, excess, metric, mode, at))


def _out_of_reach(name: str, limit: float, nearest: Candidate, excess: float, metric: str, mode: str, at: str) -> str:
    if name == "metric_at_least":
        if nearest.metric is None:
            return f"metric_at_least={limit:g} cannot be judged: no validation metric is known of any member."
        word = "short" if mode == "max" else "too much"
        return (
            f"metric_at_least={limit:g} cannot be met: the best {metric} is {nearest.metric:.4g} (member"
            f" {nearest.name}), {excess:.2g} {word}. Lower the demand, or train longer."
        )
    value, unit = getattr(nearest, name), _UNITS[name]
    where = "" if name == "params_m" else at
    return (
        f"{name}={limit:g} cannot be met: {_LEAST[name]}, member {nearest.name}, takes {value:.4g}{unit}{where},"
        f" {excess:.2g}{unit} too much. Raise the limit, or prune further (a smaller"
        " budget.latency, budget.params, ...)."
    )


def _exclusive(
    candidates: Sequence[Candidate],
    limits: Mapping[str, float],
    excess: Callable[[str, Candidate], float],
    metric: str,
    mode: str,
    at: str,
) -> str:
    """Says what the member that misses least misses."""

    def share(name: str, candidate: Candidate) -> float:
        return max(0.0, excess(name, candidate)) / max(abs(limits[name]), 1e-12)

    nearest = min(candidates, key=lambda each: sum(share(name, each) for name in limits))
    missed = []
    for name in limits:
        if excess(name, nearest) > 0:
            value = nearest.metric if name == "metric_at_least" else getattr(nearest, name)
            shown = f"{metric} " if name == "metric_at_least" else ""
            missed.append(f"{name}={limits[name]:g} ({shown}{value:.4g}{_UNITS[name]}, by {excess(name, nearest):.2g})")
    given = ", ".join(f"{name}={limit:g}" for name, limit in limits.items())
    return (
        f"Each of {given} can be met{at}, but no member meets all of them. The nearest, {nearest.name}, misses"
        f" {' and '.join(missed)}."
    )
