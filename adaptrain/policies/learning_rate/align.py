"""Align: raise a learning rate that is too low."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

from adaptrain.policies.learning_rate.factor import Factor

_FIRST = 8  # losses that tell where training began


class Align(Factor):
    """Raises the rate while new gradients keep pointing where the optimizer already goes.

    With u the optimizer's direction before the step (Adam: m/(√v+ε), momentum SGD: its buffer) and g the new gradient,
    c = cos(g, u). Steps that are too short leave the gradient where it was, so c stays above 0; at a good rate the
    noise of the batch and the curvature crossed bring it to about 0. How far above 0 tells little: where the gradient
    is mostly noise c is small at any rate. So it is tested whether it is above 0 at all, one sample after another, by

        z = mean(c)/(sd(c)/√n)    over the n samples since the last change, from 5 on

    z > `significance` raises ln m by `rise`. It is raised by three times that where the rate is clearly far too low:
    the mean is above 0.1, or z > `hint` while the loss stands still (from 8 samples on: it fell by less than a standard
    error from the first half of them to the second), where little can be lost. Where the steps are less than a tenth of
    what the cap allows, it is raised to the cap at once: what is safe for a rate that was too high is for this one.
    That is all a hint does for weights that were trained, which are only raised by `rise` else: what they know can be
    lost, and under a new head their gradients agree and the loss stands still for a while at a good rate as well. But
    as long as the loss is where it began (the last 8 samples within a standard error of the first 8, and never yet 3
    below), 16 samples with a mean above 0 are enough for a `rise`, where steps may be 1.5 times as long: what the cap
    allows trained weights is safe, and a short fine-tuning is over before noisy gradients agree for sure.
    Fresh weights begin at the cap: in the first test a mean above 0 is enough, where steps may be 1.5 times as long.
    The steps that waiting for evidence takes do not come back, and there is nothing yet to be lost. For the same reason
    that first test does not wait for the end of a warm-up, but for its first eighth (see `Multiplier`).

    z < −`significance` takes back one `rise` of what was raised. Either begins a new test, which leaves out the 3 steps
    that the direction needs to follow. A test without an outcome ends after `patience` samples.

    It never goes below 1: at a good rate a short-sighted criterion like this one always asks for less ("short-horizon
    bias", Wu et al. 2018, arXiv:1803.02021). The criterion is hypergradient descent's (Baydin et al. 2018,
    arXiv:1703.04782) made free of scale; testing before moving is Pflug's idea (1983) for the opposite end, as in
    Lang et al. 2019 (arXiv:1909.09785).

    Args:
        significance: Standard errors from 0 that are evidence.
        hint: The same where the loss stands still.
        rise: Change of ln m in one move.
        patience: Samples after which a test begins anew.
        ceiling: Largest m.
        fresh: Whether the weights were not trained before.
    """

    _state = ("log", "limit", "fresh", "begun_at", "cosines", "losses", "skip", "calm", "mean")

    def __init__(
        self,
        *,
        significance: float = 3.5,
        hint: float = 1.5,
        rise: float = 0.5,
        patience: int = 40,
        ceiling: float = 1000.0,
        fresh: bool = False,
    ) -> None:
        self.significance = significance
        self.hint = hint
        self.rise = rise
        self.patience = patience
        self.fresh = fresh
        self.log = 0.0
        self.limit = math.log(ceiling)
        self.mean: float | None = None  # of c in the last test that ended
        self.begun_at: list[float] | None = None if fresh else []  # first losses of trained weights, until they fall
        self.restart()

    def restart(self) -> None:
        """Begins a new test; `calm`: whether the last one ended without an outcome."""
        self.cosines: list[float] = []
        self.losses: list[float] = []
        self.skip = 0
        self.calm = False

    @property
    def value(self) -> float:
        """The factor m, at least 1."""
        return math.exp(self.log)

    @property
    def is_new(self) -> bool:
        """Whether the weights are fresh, and no test of them has ended yet."""
        return self.fresh and self.mean is None

    @property
    def cosine(self) -> float | None:
        """The mean of c in the present test, or in the last one while the present one is young; None: not known."""
        return fmean(self.cosines) if len(self.cosines) >= 8 else self.mean

    def observe(self, cosine: float, *, loss: float | None = None, steps: int = 1, headroom: float = 1.0) -> int:
        """Takes in one measurement of c that stands for `steps` optimizer steps.

        Args:
            cosine: c.
            loss: The training loss of its step; None: not known.
            steps: How many steps it stands for.
            headroom: How many times as long the steps may be.

        Returns:
            What a test that ended with it is sure of: 1, gradients agree; -1, they oppose; else 0, as for a hint.
        """
        if loss is not None and self.begun_at is not None and len(self.begun_at) < _FIRST:
            self.begun_at.append(loss)
        if self.skip > 0:
            self.skip -= steps
            return 0
        self.cosines = [*self.cosines, cosine]
        self.losses = [*self.losses, *([] if loss is None else [loss])]
        count = len(self.cosines)
        if count < 5:
            return 0
        mean, z = fmean(self.cosines), _errors_above_zero(self.cosines)
        far = headroom > 10
        stands = count >= 8 and (self.fresh or far) and self._loss_stands_still()
        if self.is_new and mean > 0 and headroom > 1.5:
            self._move(math.log(headroom), mean)
        elif z > (self.hint if stands else self.significance):
            steep = 3 if self.fresh and (mean > 0.1 or stands) else 1
            self._move(math.log(headroom) if far else self.rise * steep, mean)
        elif z < -self.significance:
            self._move(-self.rise, mean)
        elif self._nothing_is_learned() and count >= 2 * _FIRST and mean > 0 and headroom > 1.5:
            self._move(self.rise, mean)
        elif count >= self.patience:
            self._end(mean, skip=0, calm=True)
        return (z > self.significance) - (z < -self.significance)

    def _loss_stands_still(self) -> bool:
        half = len(self.losses) // 2
        early, late = self.losses[:half], self.losses[half:]
        return len(early) >= 4 and not _fell(early, late)

    def _nothing_is_learned(self) -> bool:
        if self.begun_at is None or min(len(self.begun_at), len(self.losses)) < _FIRST:
            return False
        late = self.losses[-_FIRST:]
        stands = not _fell(self.begun_at, late)
        if _fell(self.begun_at, late, errors=3.0):
            self.begun_at = None
        return stands

    def _move(self, by: float, mean: float) -> None:
        self.log = max(0.0, min(self.log + by, max(self.limit, self.log)))
        self._end(mean, skip=3, calm=False)

    def _end(self, mean: float, *, skip: int, calm: bool) -> None:
        self.restart()
        self.mean, self.skip, self.calm = mean, skip, calm

    def yield_to(self, cap: float, *, steps: int = 1) -> None:
        """Gives way to a cap that binds, by a tenth of its logarithm per step, so that it is not pushed against it."""
        self.log = max(0.0, self.log + 0.1 * steps * math.log(cap))

    def relapse(self) -> None:
        """After a divergence: never again more than half of the factor it happened at."""
        self.limit = max(0.0, min(self.limit, self.log - math.log(2)))
        self.log = min(self.log, self.limit)
        self.restart()


def _fell(early: Sequence[float], late: Sequence[float], *, errors: float = 1.0) -> bool:
    """Whether losses fell, by so many standard errors of the difference."""
    error = math.sqrt(variance(early) / len(early) + variance(late) / len(late))
    return fmean(early) - fmean(late) >= errors * error


def _errors_above_zero(values: Sequence[float]) -> float:
    """Returns the mean of the values in standard errors."""
    return fmean(values) / math.sqrt(max(variance(values) / len(values), 1e-12))
