"""The product of the factors: one multiplier over any scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from adaptrain.policies.learning_rate.align import Align
from adaptrain.policies.learning_rate.batch import Batch
from adaptrain.policies.learning_rate.cap import Cap
from adaptrain.policies.learning_rate.factor import Factor
from adaptrain.policies.learning_rate.guard import Guard, Verdict
from adaptrain.policies.learning_rate.plateau import LossPlateau, MetricPlateau
from adaptrain.policies.learning_rate.recover import Recover

_OWN = ("capped", "peak", "rate", "is_low_on_purpose")
NAMES = ("align", "cap", "plateau", "batch", "recover", "guard")


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What one optimizer step shows before it is taken.

    Args:
        loss: The mean training loss over the step's samples; None where the step had none.
        rate: The scheduler's learning rate, the highest of the parameter groups.
        base: The rate that the scheduler warms up to, where it has said so; None: not known.
        gradients_finite: Whether every gradient is finite.
        probed: How many steps the two probes below stand for; 0 where they were not measured.
        cosine: cos(g, u), the agreement of the gradient with the optimizer's direction; None: not known.
        ratio: Median ‖û‖_F/σ_ref per unit of learning rate (see `Cap`); None: not known.
    """

    loss: float | None
    rate: float
    base: float | None = None
    gradients_finite: bool = True
    probed: int = 0
    cosine: float | None = None
    ratio: float | None = None


class Multiplier:
    """Multiplies the scheduler's rate by the product of the factors that are on.

        lr = lr_scheduler · clip(m_align · m_plateau · m_guard, 1/1000, 1000) · m_batch · m_recover · cap

    Every argument is a factor, or None where it is off.
    """

    def __init__(
        self,
        *,
        align: Align | None = None,
        cap: Cap | None = None,
        plateau: LossPlateau | MetricPlateau | None = None,
        batch: Batch | None = None,
        recover: Recover | None = None,
        guard: Guard | None = None,
        bound: float = 1000.0,
    ) -> None:
        self.align = align
        self.cap = cap
        self.plateau = plateau
        self.batch = batch
        self.recover = recover
        self.guard = guard
        self.bound = bound
        self.capped = 1.0
        self.peak = 0.0  # the scheduler's highest rate so far, without spikes above what it warms up to
        self.rate = 0.0  # the scheduler's rate at the last step
        self.is_low_on_purpose = False  # the schedule is warming up or annealing, and align has to wait

    @property
    def factors(self) -> dict[str, float]:
        """The value of every factor by name; 1 where it is off."""
        named: dict[str, Align | LossPlateau | MetricPlateau | Batch | Recover | Guard | None] = {
            "align": self.align,
            "plateau": self.plateau,
            "batch": self.batch,
            "recover": self.recover,
            "guard": self.guard,
        }
        values = {name: 1.0 if factor is None else factor.value for name, factor in named.items()}
        return values | {"cap": self.capped}

    @property
    def value(self) -> float:
        """The multiplier of the present step."""
        return self._scale() * _product(self.recover) * self.capped

    def _scale(self) -> float:
        bounded = _product(self.align, self.plateau, self.guard)
        return min(self.bound, max(1 / self.bound, bounded)) * _product(self.batch)

    def _limited_by(self, cap: Cap) -> float:
        """Returns the rate that the cap is for; recovering, which undoes annealing for a while, never goes above it."""
        return max(cap.annealed * self.peak, self.rate * _product(self.recover)) * self._scale()

    @property
    def is_searching(self) -> bool:
        """Whether the rate may soon be raised, so that every step's probe counts."""
        return self.align is not None and not self.align.calm and not self.is_low_on_purpose

    def step(self, signal: Signal) -> Verdict:
        """Takes in what a step shows before it is taken, and moves the factors.

        Returns:
            The guard's verdict: `"accept"`, or why the step must not reach the weights.
        """
        verdict: Verdict = "accept"
        rising = signal.rate > self.rate * (1 + 1e-9) and self.rate > 0
        self.rate = signal.rate
        self.peak = max(signal.rate, self.peak if signal.base is None else min(self.peak, signal.base))
        self.is_low_on_purpose = self._waits_for_warmup(signal.base) if rising else self.rate < 0.5 * self.peak
        if self.guard is not None and signal.loss is not None:
            verdict = self.guard.observe(signal.loss, gradients_finite=signal.gradients_finite)
        if verdict == "accept":
            self._move(signal)
        return verdict

    def _waits_for_warmup(self, base: float | None) -> bool:
        """Fresh weights do not wait for all of it: the first eighth has kept them from what warm-up is for."""
        return self.align is None or not self.align.is_new or self.rate < 0.125 * (base or 0.0)

    def _move(self, signal: Signal) -> None:
        if self.align is not None and signal.cosine is not None and math.isfinite(signal.cosine):
            if self.is_low_on_purpose:
                self.align.restart()
            else:
                headroom = 1.0 if self.cap is None else self.cap.headroom(self._limited_by(self.cap))
                evidence = self.align.observe(signal.cosine, loss=signal.loss, steps=signal.probed, headroom=headroom)
                if self.cap is not None and (evidence < 0 or self.capped < 1):
                    self.cap.adjust(evidence)
        if isinstance(self.plateau, LossPlateau) and signal.loss is not None and math.isfinite(signal.loss):
            cosine = None if self.align is None else self.align.cosine
            self.plateau.observe(signal.loss, rate=signal.rate, cosine=cosine)
        for factor in (self.batch, self.recover):
            if factor is not None:
                factor.step()
        if self.cap is not None:
            if signal.probed and (signal.ratio is None or math.isfinite(signal.ratio)):
                self.cap.observe(signal.ratio)
            self.capped = self.cap.value(self._limited_by(self.cap))
            if self.align is not None and self.capped < 0.25:
                self.align.yield_to(4 * self.capped)
                self.capped = self.cap.value(self._limited_by(self.cap))

    def structure_changed(self, removed: float, *, window: int) -> None:
        """Takes in that the model lost the share `removed` of its parameters; `window` steps are for recovering."""
        if self.recover is not None:
            ratio = self.peak / self.rate if self.rate > 0 else 1.0
            self.recover.open(removed=removed, peak_over_now=ratio, window=window)
        self._forget()

    def batch_changed(self, old: float, new: float, *, noise_scale: float | None = None) -> None:
        """Takes in another global batch size, and the gradient noise scale in samples where it was measured."""
        if self.batch is not None:
            self.batch.change(old, new, noise_scale=noise_scale)
        self._forget()

    def _forget(self) -> None:
        for factor in (self.align, self.plateau, self.guard):
            if factor is not None:
                factor.restart()

    def rolled_back(self) -> None:
        """Takes in that the weights went back to the last snapshot."""
        if self.guard is not None:
            self.guard.rolled_back()
        if self.align is not None:
            self.align.relapse()
        if self.cap is not None:
            self.cap.relapse()
        if isinstance(self.plateau, LossPlateau):
            self.plateau.restart()

    def _named(self) -> dict[str, Factor]:
        return {name: factor for name in NAMES if (factor := getattr(self, name)) is not None}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of every factor that is on, as plain Python."""
        own = {name: getattr(self, name) for name in _OWN}
        return own | {name: factor.state_dict() for name, factor in self._named().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned; a factor that was off then starts afresh."""
        for name in _OWN:
            setattr(self, name, state_dict[name])
        for name, factor in self._named().items():
            if name in state_dict:
                factor.load_state_dict(state_dict[name])


def _product(*factors: Align | LossPlateau | MetricPlateau | Batch | Recover | Guard | None) -> float:
    product = 1.0
    for factor in factors:
        if factor is not None:
            product *= factor.value
    return product
