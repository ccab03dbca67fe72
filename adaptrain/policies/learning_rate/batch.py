"""Batch: the learning rate that goes with another global batch size."""

from __future__ import annotations

import math
from typing import Literal

from adaptrain.policies.learning_rate.factor import Factor


class Batch(Factor):
    """Scales the rate with the global batch size B, relative to the size B_ref that training began with.

    m = √(B/B_ref) for Adam and its kin (Malladi et al. 2022, arXiv:2205.10287). For SGD, m = B/B_ref (Goyal et al.
    2017, arXiv:1706.02677), or AdaScale's gain (Johnson et al. 2020, arXiv:2007.05105), which is near that where
    gradients are mostly noise and near 1 where they are not. With the noise scale N = tr(Σ)/|G|² the gain is

        m = (1 + N/B_ref) / (1 + N/B)

    The new value is reached over a ramp in ln m so that no single step jumps.

    Args:
        scaling: `"sqrt"`, `"linear"`, `"adascale"` (as linear until a noise scale was measured), or None: not.
        ramp: Steps from the old value to the new one.
    """

    _state = ("reference", "log", "target", "left", "noise_scale")

    def __init__(self, *, scaling: Literal["sqrt", "linear", "adascale"] | None = "sqrt", ramp: int = 20) -> None:
        self.scaling = scaling
        self.ramp = ramp
        self.reference: float | None = None
        self.log = 0.0
        self.target = 0.0
        self.left = 0
        self.noise_scale: float | None = None

    @property
    def value(self) -> float:
        """The factor m, greater than 0."""
        return math.exp(self.log)

    def change(self, old: float, new: float, *, noise_scale: float | None = None) -> None:
        """Takes in that the global batch size changed.

        Args:
            old: The samples of a step before.
            new: The samples of a step from now on.
            noise_scale: N in samples, infinite where no signal is left; None: not measured now.
        """
        if self.reference is None:
            self.reference = float(old)
        if noise_scale is not None:
            self.noise_scale = noise_scale
        if self.scaling is not None:
            self.target = self._log_of(new / self.reference, self.reference)
            self.left = self.ramp

    def _log_of(self, times: float, reference: float) -> float:
        if self.scaling == "adascale" and self.noise_scale is not None and math.isfinite(self.noise_scale):
            noise = max(0.0, self.noise_scale) / reference
            return math.log((1 + noise) / (1 + noise / times))
        return math.log(times) * (0.5 if self.scaling == "sqrt" else 1.0)

    def step(self) -> None:
        """Moves one optimizer step along the ramp."""
        if self.left:
            self.log += (self.target - self.log) / self.left
            self.left -= 1
