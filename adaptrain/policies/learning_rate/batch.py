"""Batch: the learning rate that goes with another global batch size."""

from __future__ import annotations

import math
from typing import Literal

from adaptrain.policies.learning_rate.factor import Factor


class Batch(Factor):
    """Scales the rate with the global batch size B, relative to the size B_ref that training began with.

    m = √(B/B_ref) for Adam and its kin (Malladi et al. 2022, arXiv:2205.10287), m = B/B_ref for SGD (Goyal et al. 2017,
    arXiv:1706.02677), reached over a ramp in ln m so that no single step jumps.

    Args:
        scaling: `"sqrt"`, `"linear"`, or None for no scaling.
        ramp: Steps from the old value to the new one.
    """

    _state = ("reference", "log", "target", "left")

    def __init__(self, *, scaling: Literal["sqrt", "linear"] | None = "sqrt", ramp: int = 20) -> None:
        self.scaling = scaling
        self.ramp = ramp
        self.reference: float | None = None
        self.log = 0.0
        self.target = 0.0
        self.left = 0

    @property
    def value(self) -> float:
        """The factor m, greater than 0."""
        return math.exp(self.log)

    def change(self, old: float, new: float) -> None:
        """Takes in that the global batch size changed from `old` to `new` samples."""
        if self.reference is None:
            self.reference = float(old)
        if self.scaling is not None:
            self.target = math.log(new / self.reference) * (0.5 if self.scaling == "sqrt" else 1.0)
            self.left = self.ramp

    def step(self) -> None:
        """Moves one optimizer step along the ramp."""
        if self.left:
            self.log += (self.target - self.log) / self.left
            self.left -= 1
