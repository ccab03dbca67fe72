"""Align: raise a learning rate that is too low."""

from __future__ import annotations

import math

from adaptrain.policies.learning_rate.factor import Factor


class Align(Factor):
    """Raises the rate while new gradients keep pointing where the optimizer already goes.

    With u the optimizer's direction before the step (Adam: m/(√v+ε), momentum SGD: its buffer) and g the new gradient,
    c = cos(g, u). Steps that are too short leave the gradient where it was, so c stays above 0; at a good rate the
    noise of the batch and the curvature crossed bring it to about 0. With c̄ the debiased moving average of c,

        ln m += min(max_rise, gain · max(0, c̄ − threshold))    per step, after `warmup` steps

    It never lowers: at a good rate a short-sighted criterion like this one always asks for less ("short-horizon
    bias", Wu et al. 2018, arXiv:1803.02021). The criterion is hypergradient descent's (Baydin et al. 2018,
    arXiv:1703.04782) made free of scale.

    Args:
        time_constant: Steps over which the average of c forgets.
        threshold: The value of c̄ up to which the rate is left alone.
        gain: Rise of ln m per step and unit of c̄ above the threshold.
        max_rise: Largest rise of ln m in one step.
        warmup: Steps to watch before the first rise.
        ceiling: Largest m.
    """

    _state = ("log", "limit", "average", "weight", "steps")

    def __init__(
        self,
        *,
        time_constant: float = 20.0,
        threshold: float = 0.02,
        gain: float = 0.1,
        max_rise: float = 0.05,
        warmup: int = 10,
        ceiling: float = 100.0,
    ) -> None:
        self.time_constant = time_constant
        self.threshold = threshold
        self.gain = gain
        self.max_rise = max_rise
        self.warmup = warmup
        self.log = 0.0
        self.limit = math.log(ceiling)
        self.average = 0.0
        self.weight = 0.0
        self.steps = 0

    @property
    def value(self) -> float:
        """The factor m, at least 1."""
        return math.exp(self.log)

    @property
    def cosine(self) -> float | None:
        """The debiased average c̄, or None before the first measurement."""
        return self.average / self.weight if self.weight else None

    def observe(self, cosine: float, *, steps: int = 1) -> None:
        """Takes in one measurement of c that stands for `steps` optimizer steps."""
        keep = math.exp(-steps / self.time_constant)
        self.average = keep * self.average + (1 - keep) * cosine
        self.weight = keep * self.weight + (1 - keep)
        self.steps += steps
        if self.steps > self.warmup:
            rise = min(self.max_rise, self.gain * max(0.0, self.average / self.weight - self.threshold))
            self.log = min(self.log + steps * rise, max(self.limit, self.log))

    def yield_to(self, cap: float, *, steps: int = 1) -> None:
        """Gives way to a cap that binds, by a tenth of its logarithm per step, so that it is not pushed against it."""
        self.log = max(0.0, self.log + 0.1 * steps * math.log(cap))

    def relapse(self) -> None:
        """After a divergence: never again more than half of the factor it happened at."""
        self.limit = max(0.0, min(self.limit, self.log - math.log(2)))
        self.log = min(self.log, self.limit)
