"""Guard: keep a bad step from the weights, and go back where the weights went bad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal

from adaptrain.policies.learning_rate.factor import Factor

Verdict = Literal["accept", "non_finite", "spike", "diverged"]


class Guard(Factor):
    """Judges every step by its loss before it reaches the weights.

    * A loss or gradient that is not finite: skip the step.
    * A spike, more than `sigmas` robust standard deviations (1.4826 · MAD) above the median of the last 128 accepted
      losses: skip. Up to twice the loss that training began with it must be one of the logarithms as well, so that
      the heavy tail of a loss near zero, where a hard sample is no fault, is left alone; and at most 4 of 128 steps
      are skipped as spikes, so that a loss that moved for good is soon the new normal. Nothing is judged before 32
      losses.
    * Divergence: 5 of the last 8 steps bad, or the median of the last 32 accepted losses both significantly above
      where it was at the last snapshot and half-way back to where training began: roll back to the snapshot.

    After a rollback the factor m is cut (to a half, then by 4, then by 8) and, `quiet` steps without a fault later,
    regrows twofold per `quiet` steps: to 1 after the first divergence, and after another to half of the value it
    happened at. Skipping spikes and going back is the practice of large language-model runs (Chowdhery et al. 2022,
    arXiv:2204.02311, sec. 5.1); the median and MAD are Hampel's identifier.

    Args:
        sigmas: Robust standard deviations above the median that make a spike.
        quiet: Steps without a fault before a snapshot is due and before the factor regrows.
        rollbacks: How often a run may go back.
    """

    _state = (
        *("log", "ceiling", "done", "initial", "reference", "limit"),
        *("losses", "recent", "spikes", "accepted", "calm", "age"),
    )

    def __init__(self, *, sigmas: float = 6.0, quiet: int = 100, rollbacks: int = 3) -> None:
        self.sigmas = sigmas
        self.quiet = quiet
        self.rollbacks = rollbacks
        self.log = 0.0
        self.ceiling = 0.0
        self.done = 0
        self.initial: float | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets the losses seen: the model or its batches are others now."""
        self.losses: list[float] = []
        self.limit: float | None = None
        self.reference: float | None = None
        self.recent: list[bool] = []
        self.spikes: list[bool] = []
        self.accepted = 0
        self.calm = 0  # accepted steps since the last fault
        self.age = 0  # accepted steps since the last snapshot

    @property
    def value(self) -> float:
        """The factor m in (0, 1]."""
        return math.exp(self.log)

    @property
    def exhausted(self) -> bool:
        """Whether every rollback was used."""
        return self.done >= self.rollbacks

    def observe(self, loss: float, *, gradients_finite: bool = True) -> Verdict:
        """Judges one step.

        Args:
            loss: The mean training loss of the step, possibly not finite.
            gradients_finite: Whether every gradient is.

        Returns:
            `"accept"`; `"non_finite"` or `"spike"`: skip the step; `"diverged"`: skip it and roll back.
        """
        finite = gradients_finite and math.isfinite(loss)
        high = finite and self.limit is not None and loss > self.limit
        self.recent = [*self.recent[-7:], high or not finite]
        if sum(self.recent) >= 5:
            return "diverged"
        skip = high and sum(self.spikes) < 4
        self.spikes = [*self.spikes[-127:], skip]
        if not finite or skip:
            self.calm = 0
            return "spike" if finite else "non_finite"
        self._accept(loss)
        return "diverged" if self._risen() else "accept"

    def _accept(self, loss: float) -> None:
        self.losses = [*self.losses[-127:], loss]
        self.accepted += 1
        self.calm += 1
        self.age += 1
        if self.calm > self.quiet:
            self.log = min(max(self.log, self.ceiling), self.log + math.log(2) / self.quiet)
        if self.initial is None and self.accepted == 8:
            self.initial = median(self.losses)
        if self.accepted >= 32 and self.accepted % 8 == 0:
            self.limit = upper_limit(self.losses, self.sigmas, worst=2 * (self.initial or 0.0))

    def _risen(self) -> bool:
        if self.accepted % 8 or self.accepted < 32 or self.initial is None:
            return False
        recent = self.losses[-32:]
        low = self.initial if self.reference is None else self.reference
        noise = self.sigmas * deviation(recent, median(recent))
        return median(recent) > max(low + noise, low + 0.5 * (self.initial - low))

    def snapshot_due(self, loss: float) -> bool:
        """Whether the weights that gave `loss` should be kept: a calm stretch, and an ordinary loss at its end."""
        if min(self.calm, self.age) < self.quiet or len(self.losses) < 32:
            return False
        recent = self.losses[-32:]
        center = median(recent)
        ordinary = loss <= center + deviation(recent, center)
        return ordinary and (self.reference is None or center <= self.reference + 2 * deviation(recent, center))

    def kept(self) -> None:
        """Takes in that a snapshot was taken: the losses of now are what a later rise is measured from."""
        self.reference = median(self.losses[-32:]) if len(self.losses) >= 32 else None
        self.age = 0

    def rolled_back(self) -> None:
        """Takes in that the weights of the snapshot are back; cuts the factor."""
        self.done += 1
        if self.done > 1:
            self.ceiling = min(0.0, self.log - math.log(2))
        self.log -= self.done * math.log(2)
        reference = self.reference
        self.restart()
        self.reference = reference


def deviation(values: Sequence[float], center: float) -> float:
    """Returns the robust standard deviation of `values` around `center`: 1.4826 times the median distance."""
    return 1.4826 * median(abs(value - center) for value in values)


def upper_limit(values: Sequence[float], sigmas: float, *, worst: float) -> float:
    """Returns the value above which a loss is a spike: `sigmas` above the median, in plain and in log scale alike.

    In log scale a loss that has fallen a long way within `values` would excuse anything, so above `worst` the plain
    scale alone counts. A spread below a thousandth of the median counts as that: a loss that hardly moves has no
    spikes in its last digits.
    """
    center = median(values)
    limit = center + sigmas * max(deviation(values, center), 1e-3 * abs(center))
    if min(values) <= 0:
        return limit
    logs = [math.log(value) for value in values]
    center = median(logs)
    tail = math.exp(min(700.0, center + sigmas * max(deviation(logs, center), 1e-3)))
    return max(limit, min(tail, worst))
