"""Plateau: lower the learning rate where the loss stands still or rises."""

from __future__ import annotations

import math
from typing import Literal

from adaptrain.policies.learning_rate.factor import Factor


class LossPlateau(Factor):
    """Halves the rate where the training loss stopped falling, judged over windows of steps.

    For two windows of n steps in a row with means μ₋, μ and standard deviations s₋, s,

        z = (μ₋ − μ)/√((s₋² + s²)/n)

    is how surely the loss fell (Welch's statistic). Two windows running with z < 1 while c̄ < 0.02 (the gradient no
    longer agrees with the direction, so the steps are not too short), or one with z < −3, halve. Only windows over
    which the scheduler's rate stood still are judged, unless `anneal=True`: a schedule that anneals needs no second.

    Args:
        window: Steps in a window, n.
        anneal: Judge also while the scheduler moves the rate.
        floor: Smallest factor.
    """

    _state = ("log", "count", "total", "squares", "previous", "flat", "first_rate")

    def __init__(self, *, window: int = 50, anneal: bool = False, floor: float = 0.01) -> None:
        self.window = window
        self.anneal = anneal
        self.floor = math.log(floor)
        self.log = 0.0
        self.restart()

    def restart(self) -> None:
        """Forgets the losses seen, not the factor: they were another model's or another rate's."""
        self.count = 0
        self.total = 0.0
        self.squares = 0.0
        self.previous: list[float] | None = None  # mean and variance of the window before
        self.flat = 0
        self.first_rate: float | None = None

    @property
    def value(self) -> float:
        """The factor in (0, 1]."""
        return math.exp(self.log)

    def observe(self, loss: float, *, rate: float, cosine: float | None) -> bool:
        """Takes in one step's loss.

        Args:
            loss: The training loss, finite.
            rate: The scheduler's learning rate at this step.
            cosine: The average alignment c̄, or None where it is not known (then it does not object).

        Returns:
            Whether the factor was halved.
        """
        if self.first_rate is None:
            self.first_rate = rate
        if not self.anneal and not math.isclose(rate, self.first_rate, rel_tol=1e-9):
            self.restart()
            self.first_rate = rate
        self.count += 1
        self.total += loss
        self.squares += loss * loss
        if self.count < self.window:
            return False
        mean = self.total / self.count
        variance = max(0.0, self.squares / self.count - mean * mean)
        self.count, self.total, self.squares = 0, 0.0, 0.0
        before, self.previous = self.previous, [mean, variance]
        if before is None:
            return False
        spread = math.sqrt((before[1] + variance) / self.window)
        z = (before[0] - mean) / spread if spread > 0 else math.copysign(math.inf, before[0] - mean)
        self.flat = self.flat + 1 if z < 1 and (cosine is None or cosine < 0.02) else 0
        if self.flat >= 2 or z < -3:
            self.log = max(self.floor, self.log - math.log(2))
            self.restart()
            return True
        return False


class MetricPlateau(Factor):
    """Halves the rate where a validation metric has not improved for a few validations (as ReduceLROnPlateau).

    Args:
        mode: `"min"` where lower is better, else `"max"`.
        patience: Validations without an improvement that are put up with.
        threshold: Relative change that counts as an improvement.
        floor: Smallest factor.
    """

    _state = ("log", "best", "waited")

    def __init__(
        self, *, mode: Literal["min", "max"], patience: int = 3, threshold: float = 1e-3, floor: float = 0.01
    ) -> None:
        self.mode = mode
        self.patience = patience
        self.threshold = threshold
        self.floor = math.log(floor)
        self.log = 0.0
        self.restart()

    def restart(self) -> None:
        """Forgets the best value seen, not the factor."""
        self.best: float | None = None
        self.waited = 0

    @property
    def value(self) -> float:
        """The factor in (0, 1]."""
        return math.exp(self.log)

    def observe(self, metric: float) -> bool:
        """Takes in one validation's metric and returns whether the factor was halved."""
        signed = -metric if self.mode == "min" else metric
        improved = self.best is None or signed > self.best + self.threshold * abs(self.best)
        if improved and math.isfinite(signed):
            self.best, self.waited = signed, 0
            return False
        self.waited += 1
        if self.waited <= self.patience:
            return False
        self.log = max(self.floor, self.log - math.log(2))
        self.waited = 0
        return True
