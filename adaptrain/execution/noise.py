"""Squared gradient norms at two batch sizes, from the micro-batches and ranks at hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from adaptrain.execution.ranks import Ranks


@dataclass(frozen=True)
class NoiseSample:
    """The gradient's squared norm over few and over more samples, each gradient a mean over its samples.

    Args:
        small: The fewer samples.
        small_squared_norm: The squared norm over these.
        big: The more samples.
        big_squared_norm: The squared norm over these.
    """

    small: float
    small_squared_norm: float
    big: float
    big_squared_norm: float


def squared_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Returns the squared norm of all gradients; sparse ones are left out."""
    gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
    if not gradients:
        return 0.0
    norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
    return float(torch.stack([norm.double() for norm in norms]).square().sum())


class NoiseProbe:
    """Takes one `NoiseSample` per step where one can be had.

    In one process: the gradient after a batch's first micro-batch, rescaled to that micro-batch's own mean, and the one
    after its last. With several ranks: the ranks' own gradients of the whole step, and their average; what the first
    micro-batch tells is not asked then.

    Args:
        module: The module that is trained.
        ranks: The ranks of the run.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self._module = module
        self._ranks = ranks
        self._first: tuple[float, float] | None = None
        self._samples = 0.0
        self.sample: NoiseSample | None = None

    def begin(self) -> None:
        """Begins an attempt at a batch."""
        self._first = None
        self.sample = None

    def micro_batch(self, samples: int, share: float) -> None:
        """After a backward pass; the first of an attempt counts, where it is not the whole batch.

        Args:
            samples: Its samples.
            share: Its share in the batch's gradient.
        """
        if self._ranks.count == 1 and self._first is None and share < 1:
            self._first = float(samples), squared_norm(self._module.parameters()) / share**2

    def batch(self, samples: int) -> None:
        """After all micro-batches of a batch, while its gradients are still by themselves."""
        if self._first is not None:
            self.sample = NoiseSample(*self._first, float(samples), squared_norm(self._module.parameters()))

    def before_average(self, samples: int, *, begins_window: bool, ends_window: bool, scale: float) -> float:
        """With several ranks, before they average: returns this rank's squared norm.

        Args:
            samples: This rank's samples in this batch.
            begins_window: Whether the batch begins an accumulation window.
            ends_window: Whether it ends one.
            scale: The factor that this rank's gradient carries.
        """
        self._samples = samples + (0.0 if begins_window else self._samples)
        if self._ranks.count == 1 or not ends_window:
            return 0.0
        return squared_norm(self._module.parameters()) / scale**2

    def after_average(self, own: float) -> None:
        """With several ranks, after they averaged. A collective.

        Args:
            own: What `before_average` returned.
        """
        if self._ranks.count == 1:
            return
        total, samples = self._ranks.sums([own, self._samples])
        count = self._ranks.count
        averaged = squared_norm(self._module.parameters())
        self.sample = NoiseSample(samples / count, total / count, samples, averaged)
