"""What one optimizer step shows before it is taken: its loss, its gradients, and now and then its update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptrain.execution.update_probe import gradient_norm, probe, reference_sizes

PROBE_EVERY = 4
FIRST_STEPS = 16  # probed one by one: there the update changes fastest


class StepSensor:
    """Reads an optimizer step of one rank.

    Args:
        probes: Measure the update's direction and size, at each of the first 16 steps and of those that a reader asks
            for, and else at every fourth.
        gradients: Look for gradients that are not finite.
    """

    def __init__(self, *, probes: bool, gradients: bool) -> None:
        self.probes = probes
        self.gradients = gradients
        self.steps = 0
        self.references: list[float] | None = None  # what update sizes are measured by

    def read(
        self, optimizer: Optimizer, losses: Sequence[Tensor], *, scale: float, each: bool = False
    ) -> tuple[list[float], int]:
        """Reads the step that is about to be taken; the numbers cost one transfer from the device.

        Args:
            optimizer: With gradients in place, unscaled, before clipping.
            losses: The loss of every batch in the accumulation window, divided by the window's length.
            scale: What the sum of `losses` is multiplied by to be their mean.
            each: Whether to probe this step whichever it is.

        Returns:
            [loss, 1.0 where every gradient is finite, cos(g, u), median ‖û‖_F/σ_ref], nan where not known, and how
            many steps the last two stand for: 0 where they were not measured.
        """
        norm = gradient_norm(optimizer) if self.gradients else torch.zeros(())
        loss = torch.stack([x.detach().float() for x in losses]).sum().to(norm.device) * scale if losses else norm
        first, second = torch.stack([loss, norm]).tolist()
        finite = math.isfinite(second)
        probed, cosine, ratio = 0, None, None
        if self.probes and not self._knows(optimizer):
            self.references = reference_sizes(optimizer)
        if self.probes and finite:
            probed = 1 if each or self.steps < FIRST_STEPS else PROBE_EVERY * (self.steps % PROBE_EVERY == 0)
        if probed and self.references is not None:
            cosine, ratio = probe(optimizer, self.references, turn=self.steps)
        self.steps += 1
        unknown = math.nan
        return [
            first if losses else unknown,
            float(finite),
            unknown if cosine is None else cosine,
            unknown if ratio is None else ratio,
        ], probed

    def _knows(self, optimizer: Optimizer) -> bool:
        """Whether there is a reference for each parameter: not at first, after a cut, and where a group was added."""
        return self.references is not None and len(self.references) == sum(
            len(g["params"]) for g in optimizer.param_groups
        )
