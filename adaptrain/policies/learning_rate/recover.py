"""Recover: a higher rate for a while after the model lost some of its parts."""

from __future__ import annotations

from adaptrain.policies.learning_rate.factor import Factor


class Recover(Factor):
    """After a structural change, rewinds the rate part of the way to its peak and lets it come back.

        top = 1 + removed · (min(limit, lr_peak/lr_now) − 1)

    The factor rises linearly from 1 to `top` over the first fifth of a window and falls linearly back to 1 over the
    rest. A model pruned late in its schedule has to relearn at a rate that was meant for polishing; rewinding the rate
    alone is what works best (Renda et al. 2020, arXiv:2003.02389). While the rate stands at its peak the factor is 1. A
    change inside a window opens a new one from the value reached.

    Args:
        limit: The largest rewind.
    """

    _state = ("top", "start", "window", "step_in")

    def __init__(self, *, limit: float = 4.0) -> None:
        self.limit = limit
        self.top = 1.0
        self.start = 1.0
        self.window = 0
        self.step_in = 0

    @property
    def value(self) -> float:
        """The factor, at least 1."""
        if self.step_in >= self.window:
            return 1.0
        rise = max(1, self.window // 5)
        if self.step_in < rise:
            return self.start + (self.top - self.start) * self.step_in / rise
        return 1 + (self.top - 1) * (self.window - self.step_in) / (self.window - rise)

    def open(self, *, removed: float, peak_over_now: float, window: int) -> float:
        """Opens a recovery window and returns the `top` it rises to.

        Args:
            removed: Share of the parameters that the change removed, in [0, 1].
            peak_over_now: The scheduler's highest rate so far over its present one.
            window: Optimizer steps to recover in.
        """
        self.start = self.value
        self.top = max(self.start, 1 + removed * (min(self.limit, max(1.0, peak_over_now)) - 1))
        self.window = window if self.top > 1 else 0
        self.step_in = 0
        return self.top

    def step(self) -> None:
        """Moves one optimizer step along the window."""
        if self.step_in < self.window:
            self.step_in += 1
