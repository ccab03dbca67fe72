"""When to prune, and how much of the whole reduction each time: a few events over the course of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from adaptrain.errors import ConfigurationError


class Event(NamedTuple):
    """One pruning event.

    Args:
        position: The share of training, in [0, 1], after which it is due.
        share: The share of the whole reduction, in (0, 1], that is reached with it.
    """

    position: float
    share: float


@dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """Spaces events evenly over a stretch of training; a subclass says how far each one goes.

    Args:
        begin: The share of training after which the first event is due, in [0, 1].
        end: The share after which the last one is due; what is left of training recovers from it.
        events: How many there are.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    begin: float = 0.1
    end: float = 0.6
    events: int = 6

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigurationError(f"{name} must be a share of training in [0, 1], got {value!r}.")
        if isinstance(self.events, bool) or not isinstance(self.events, int) or self.events < 1:
            raise ConfigurationError(f"events must be a whole number of at least 1, got {self.events!r}.")
        if self.begin > self.end or (self.events > 1 and self.begin == self.end):
            raise ConfigurationError(
                f"begin must lie before end, got begin={self.begin} and end={self.end} for {self.events} events."
            )

    def share(self, time: float) -> float:
        """Returns the share of the whole reduction reached at `time` in (0, 1] of the stretch."""
        raise NotImplementedError

    def plan(self) -> list[Event]:
        """Returns the events in order; the last one reaches the whole reduction."""
        step = (self.end - self.begin) / max(1, self.events - 1)
        return [Event(self.begin + step * index, self.share((index + 1) / self.events)) for index in range(self.events)]


@dataclass(frozen=True, kw_only=True)
class CubicSchedule(SparsitySchedule):
    """Cuts most at first, while much is redundant, and ever less: share = 1 − (1 − t)³.

    Source: Zhu and Gupta 2017, "To prune, or not to prune".
    """

    def share(self, time: float) -> float:
        """Returns the share of the whole reduction reached at `time` in (0, 1] of the stretch."""
        return 1 - (1 - time) ** 3


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(SparsitySchedule):
    """Cuts equally much at every event."""

    def share(self, time: float) -> float:
        """Returns the share of the whole reduction reached at `time` in (0, 1] of the stretch."""
        return time


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(SparsitySchedule):
    """Cuts little at both ends and most in the middle: share = (1 − cos πt) / 2."""

    def share(self, time: float) -> float:
        """Returns the share of the whole reduction reached at `time` in (0, 1] of the stretch."""
        return (1 - math.cos(math.pi * time)) / 2


@dataclass(frozen=True, kw_only=True)
class OneShotSchedule:
    """Cuts everything at once.

    Args:
        at: The share of training, in [0, 1], after which to cut.

    Raises:
        ConfigurationError: `at` is out of its range.
    """

    at: float = 0.3

    def __post_init__(self) -> None:
        if isinstance(self.at, bool) or not isinstance(self.at, (int, float)) or not 0 <= self.at <= 1:
            raise ConfigurationError(f"at must be a share of training in [0, 1], got {self.at!r}.")

    def plan(self) -> list[Event]:
        """Returns the one event."""
        return [Event(float(self.at), 1.0)]


def read_schedule(schedule: Any) -> Any:
    """Returns a schedule from what a user gave: one, the arguments of a `CubicSchedule` as a mapping, or None.

    Raises:
        ConfigurationError: It is none of these.
    """
    if schedule is None or isinstance(schedule, Mapping):
        return CubicSchedule(**(schedule or {}))
    if not callable(getattr(schedule, "plan", None)):
        raise ConfigurationError(f"schedule must be a schedule such as CubicSchedule(events=6), got {schedule!r}.")
    return schedule
