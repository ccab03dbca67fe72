"""Whether a larger global batch is worth its speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from adaptrain.policies.batch_size import Proposal

_TIMED = 20  # steps whose median is a size's speed


class SpeedCheck:
    """Takes the growth of a batch back where samples/s have fallen.

    Memory bounds what runs at once, so that a larger batch is more micro-batches, not larger ones: samples/s stay, or
    rise as an update is shared by more samples. Where they fall (memory is swapped, micro-batches had to become
    smaller, the loader cannot keep up), the steps that are saved are paid for.

    Args:
        slowdown: The share of samples/s that a growth may cost; None: any.
        hold: For how many measured steps a size that was too slow is not tried again.
    """

    def __init__(self, slowdown: float | None, *, hold: int) -> None:
        self.slowdown = slowdown
        self.hold = hold
        self.speeds: list[float] = []
        self.before: tuple[int, float] | None = None
        self.ceiling: int | None = None
        self.held = 0

    def observe(self, samples_per_s: float) -> None:
        """Takes in the speed of a step at the size in force."""
        if self.slowdown is not None and math.isfinite(samples_per_s) and samples_per_s > 0:
            self.speeds = [*self.speeds[1 - _TIMED :], samples_per_s]

    def measured(self) -> None:
        """Hears of a measured step; the ceiling is forgotten in time."""
        if self.ceiling is not None:
            self.held += 1
            if self.held >= self.hold:
                self.ceiling = None

    @property
    def is_ready(self) -> bool:
        """Whether a growth can be judged later: none is on trial, and the speed before it is known, if any is."""
        return self.before is None and len(self.speeds) in (0, _TIMED)

    def back(self, size: int) -> Proposal | None:
        """Returns the way back to the size before the last growth, where it has cost too much."""
        if self.before is None or self.slowdown is None or len(self.speeds) < _TIMED:
            return None
        old, fast = self.before
        slow = median(self.speeds)
        if slow >= (1 - self.slowdown) * fast:
            self.before = None  # it was worth it
            return None
        reason = (
            f"At {size} samples per step the run is at {slow:.4g} samples/s, {1 - slow / fast:.0%} below the"
            f" {fast:.4g} at {old}: steps of {old} are worth more."
        )
        return Proposal(size, old, reason, {"samples_per_s": slow, "samples_per_s_before": fast})

    def changed(self, old: int, new: int, *, is_back: bool) -> None:
        """Hears that the size was changed."""
        if is_back:
            self.ceiling, self.held = new, 0
        is_known = new > old and len(self.speeds) == _TIMED
        self.before = (old, median(self.speeds)) if is_known else None
        self.speeds = []

    def forget(self) -> None:
        """Forgets all speeds: the model, or the machine, is another one."""
        self.speeds, self.before, self.ceiling = [], None, None

    def state_dict(self) -> dict[str, Any]:
        """Returns the speeds and the ceiling."""
        before = None if self.before is None else list(self.before)
        return {"speeds": list(self.speeds), "before": before, "ceiling": self.ceiling, "held": self.held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with them."""
        self.speeds = [float(speed) for speed in state["speeds"]]
        self.before = None if state["before"] is None else (int(state["before"][0]), float(state["before"][1]))
        self.ceiling, self.held = state["ceiling"], int(state["held"])
