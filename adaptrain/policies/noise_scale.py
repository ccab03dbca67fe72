"""As many samples per optimizer step as the gradient's noise is worth averaging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptrain.errors import ConfigurationError
from adaptrain.policies.batch_size import Proposal
from adaptrain.policies.batch_speed import SpeedCheck
from adaptrain.policies.global_batch_size import GlobalBatchSizePolicy, check_size, is_number

_HOLD = 20  # a size that was too slow is not tried again for this many times `every` measured steps


@dataclass
class NoiseScale:
    """The simple noise scale tr(Σ)/|G|² from squared gradient norms at two batch sizes.

    With Σ the covariance of one sample's gradient and G its mean, the gradient over B samples has the expected
    squared norm |G|² + tr(Σ)/B. Two sizes give two equations; their solutions are unbiased, their quotient is not, so
    both are averaged over steps before they are divided (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1):

        |G|² ≈ (B·|g_B|² − b·|g_b|²) / (B − b)        tr(Σ) ≈ (|g_b|² − |g_B|²) / (1/b − 1/B)

    Args:
        smoothing: The weight of the past in both moving averages, in [0, 1).
    """

    smoothing: float = 0.95
    signal_sum: float = 0.0
    noise_sum: float = 0.0
    weight: float = 0.0

    def observe(self, *, small: float, small_squared_norm: float, big: float, big_squared_norm: float) -> None:
        """Takes in one step's two squared norms.

        Args:
            small: The fewer samples b; the mean gradient over them has the squared norm `small_squared_norm`.
            small_squared_norm: |g_b|².
            big: The more samples B.
            big_squared_norm: |g_B|².
        """
        signal = (big * big_squared_norm - small * small_squared_norm) / (big - small)
        noise = (small_squared_norm - big_squared_norm) / (1 / small - 1 / big)
        if not (math.isfinite(signal) and math.isfinite(noise)):
            return
        self.signal_sum += (1 - self.smoothing) * (signal - self.signal_sum)
        self.noise_sum += (1 - self.smoothing) * (noise - self.noise_sum)
        self.weight += (1 - self.smoothing) * (1 - self.weight)

    @property
    def signal(self) -> float:
        """The average of |G|²; it may be negative where noise hides it."""
        return self.signal_sum / self.weight if self.weight else 0.0

    @property
    def noise(self) -> float:
        """The average of tr(Σ)."""
        return self.noise_sum / self.weight if self.weight else 0.0

    @property
    def value(self) -> float | None:
        """The noise scale in samples; infinite where no signal is left; None where nothing was measured."""
        if not self.weight:
            return None
        if self.noise <= 0:
            return 0.0
        return self.noise / self.signal if self.signal > 0 else math.inf


class GradientNoiseScale(GlobalBatchSizePolicy):
    """Makes the global batch as large as the gradient's noise is worth averaging: near tr(Σ)/|G|² samples.

    Below that noise scale twice the samples take about half the steps; above it they buy little (McCandlish et al.
    2018, arXiv:1812.06162). It is measured from the micro-batches there are: the gradient after the first one
    against that after the last, or the ranks' own gradients against their average. A step in one micro-batch on one
    rank measures nothing: give a `micro_batch_size` below the batch there.

    Every `every` measured steps the size may double, where the noise scale is above √2 times the size, or halve, where
    it is below √2/4 of it; between the two, a factor of 4 apart, it stays, so that it does not swing. A dry run
    measures nothing: it runs no micro-batches.

    A growth is on trial: where the median samples/s of 20 steps at the new size are more than `slowdown` below those at
    the old one, it is taken back, with both numbers in the record. That size is tried again after 20·`every` measured
    steps, or when the model's structure or the machine has changed. Speeds are measured: for runs that can be repeated
    exactly give `slowdown=None`.

    Micro-batches sorted by length are no random sample of the batch: with `split_by="tokens"` the small gradient on one
    rank is that of the longest texts. Use `split_by="samples"` where lengths differ much.

    Args:
        maximum: The most samples of one optimizer step, over all ranks.
        minimum: The fewest; None: the loader's.
        every: Measured steps between two changes, and before the first.
        smoothing: The weight of the past in the moving averages over measured steps, in [0, 1).
        slowdown: The share of samples/s that a growth may cost, in (0, 1); None: growth does not look at speed.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    def __init__(
        self,
        *,
        maximum: int,
        minimum: int | None = None,
        every: int = 50,
        smoothing: float = 0.95,
        slowdown: float | None = 0.2,
    ) -> None:
        check_size("GradientNoiseScale: maximum", maximum)
        if minimum is not None:
            check_size("GradientNoiseScale: minimum", minimum)
            if minimum > maximum:
                raise ConfigurationError(
                    f"GradientNoiseScale: maximum must be at least minimum, got minimum={minimum}, maximum={maximum}."
                )
        check_size("GradientNoiseScale: every", every, what="steps")
        if not (is_number(smoothing) and 0 <= smoothing < 1):
            raise ConfigurationError(f"GradientNoiseScale: smoothing must be in [0, 1), got {smoothing!r}.")
        if slowdown is not None and not (is_number(slowdown) and 0 < slowdown < 1):
            raise ConfigurationError(
                f"GradientNoiseScale: slowdown must be a share of samples/s in (0, 1) or None, got {slowdown!r}."
            )
        self.maximum = maximum
        self.minimum = minimum
        self.every = every
        self.smoothing = smoothing
        self.scale = NoiseScale(smoothing)
        self.slowdown = slowdown
        self.speed = SpeedCheck(slowdown, hold=_HOLD * every)
        self._least: int | None = minimum
        self._quiet = 0
        self._next: tuple[int, int, bool] | None = None  # the last answer: from, to, and whether it is a way back

    @property
    def sizes(self) -> dict[str, int]:
        """The bounds that were given."""
        return {"maximum": self.maximum} | ({} if self.minimum is None else {"minimum": self.minimum})

    def first(self, size: int) -> int:
        """Returns the loader's size, within the bounds."""
        if self._least is None:
            self._least = min(size, self.maximum)
        return min(self.maximum, max(self._least, size))

    def observe(self, *, small: float, small_squared_norm: float, big: float, big_squared_norm: float) -> None:
        """Takes in one step's squared gradient norms; see `NoiseScale.observe`."""
        self.scale.observe(
            small=small, small_squared_norm=small_squared_norm, big=big, big_squared_norm=big_squared_norm
        )
        self._quiet += 1
        self.speed.measured()

    def observe_speed(self, samples_per_s: float) -> None:
        """Takes in the speed of one optimizer step, in samples per second over all ranks, at the size in force."""
        self.speed.observe(samples_per_s)

    def forget_speeds(self) -> None:
        """Forgets the speeds, and what was too slow: the model, or the machine, is another one."""
        self.speed.forget()

    def next(self, size: int, *, progress: float, unit: int) -> Proposal | None:
        """Returns a doubling or halving that the noise scale asks for, or a way back: from too slow, or into bounds."""
        back = self.speed.back(size)
        if back is not None and back.new % unit:  # a resumed run may have another number of ranks
            back = None
        proposal = back or self._by_noise(size, unit)
        self._next = None if proposal is None else (proposal.old, proposal.new, back is not None)
        return proposal

    def _by_noise(self, size: int, unit: int) -> Proposal | None:
        least = self._least if self._least is not None else size
        new = min(self.maximum, max(least, size))
        reason = f"{size} samples are outside of the bounds {least} to {self.maximum}."
        value = self.scale.value
        if new == size:
            if value is None or self._quiet < self.every:
                return None
            if value > math.sqrt(2) * size:
                new = self._grown(size, unit)
            elif value < math.sqrt(2) / 4 * size and size // 2 >= least and not (size // 2) % unit:
                new = size // 2
            if new == size:
                return None
            shown = "beyond measure" if math.isinf(value) else f"{value:.3g} samples"
            reason = f"The gradient noise scale is {shown}, {'above' if new > size else 'below'} the {size} of a step."
        readings = {"noise_trace": self.scale.noise, "squared_gradient": self.scale.signal}
        if value is not None and math.isfinite(value):
            readings["noise_scale"] = value
        return Proposal(size, new, reason, readings)

    def _grown(self, size: int, unit: int) -> int:
        """Twice the size, within the bounds, and no further than is fast."""
        if not self.speed.is_ready:
            return size
        new = min(self.maximum, 2 * size)
        return new if self.speed.ceiling is None else max(size, min(new, self.speed.ceiling // unit * unit))

    def changed(self) -> None:
        """Waits for `every` measured steps again."""
        self._quiet = 0
        if self._next is not None:
            old, new, is_back = self._next
            self.speed.changed(old, new, is_back=is_back)
            self._next = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages and how long ago the size changed."""
        return {"scale": vars(self.scale).copy(), "least": self._least, "quiet": self._quiet} | {
            "speed": self.speed.state_dict()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with them; arguments stay those given now."""
        self.scale = NoiseScale(**state["scale"])
        self.scale.smoothing = self.smoothing
        self._least = self.minimum if self.minimum is not None else state["least"]
        self._quiet = int(state["quiet"])
        if "speed" in state:
            self.speed.load_state_dict(state["speed"])
