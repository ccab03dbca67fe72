"""Which layers to stop training, from the first one up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, variance
from typing import Any, Literal

By = Literal["signal", "schedule", "turns", "unfreezing"]


class Freezing:
    """Freezes the first layers as training goes on, and thaws them where that harms.

    Only layers from the first one up save a backward pass: a frozen layer above a trained one has to pass its gradient
    on. `"signal"` follows AutoFreeze (Liu, Agarwal & Venkataraman 2021, arXiv:2102.01386): with g_l the mean gradient
    norm of layer l over a window of steps,

        η_l = |g_l(before) − g_l| / g_l(before)

    is how fast a layer still changes its course; layers go from the first one up for as long as their η is at most the
    median over the layers that train. `"schedule"` freezes them evenly between `begin` and `end`, whatever they do, as
    FreezeOut (Brock et al. 2017, arXiv:1706.04983), which also anneals each layer's rate before it goes. `"turns"`
    freezes `most` of them at once, and lets them train in one window of every `every`, to the end: they go on following
    the others, and are annealed with them. LISA (Pan et al. 2024, arXiv:2403.17919) freezes layers in turns, too, any
    of them, which saves memory and less of the backward pass. `"unfreezing"` goes the other way, where the layers were
    trained before: `most` of them are frozen from the first step on, and train again evenly between `begin` and `end`,
    the last ones first, as gradual unfreezing (Howard & Ruder 2018, arXiv:1801.06146).

    Where the loss of a window is surely above that of the window before the last layer went (z > 3 standard errors),
    all thaw, and none goes for 4 windows, then 8, and so on.

    Args:
        layers: How many layers there are.
        by: `"signal"`, `"schedule"`, `"turns"` or `"unfreezing"`.
        most: How many may be frozen.
        begin: The share of training before which none is frozen, or before which `"unfreezing"` thaws none.
        end: The share at which `"schedule"` has frozen the last one, and `"unfreezing"` thawed it.
        every: In one window of how many `"turns"` trains all layers.
    """

    def __init__(
        self,
        layers: int,
        *,
        by: By,
        most: int,
        begin: float,
        end: float,
        every: int = 2,
    ) -> None:
        self.layers = layers
        self.by = by
        self.most = most
        self.begin = begin
        self.end = end
        self.every = every
        self.frozen = 0
        self._before: list[float] | None = None  # gradient norms of the window before, of the layers that train
        self._loss: list[float] | None = None  # mean and squared standard error, before the last layer went
        self._rest = 0  # windows until a layer may go again
        self._thaws = 0
        self._turn = 0  # windows since all layers trained in turns

    def start(self, *, progress: float = 0.0, hold: bool = False) -> str:
        """Freezes what is to be frozen before the first window.

        Args:
            progress: The share of training that is over.
            hold: Freeze nothing now.

        Returns:
            Why, or "" where nothing is.
        """
        if self.by != "unfreezing" or hold:
            return ""
        self.frozen = self._by_unfreezing(progress)
        return "the last layers train first" if self.frozen else ""

    def window(self, norms: Sequence[float], losses: Sequence[float], *, progress: float, hold: bool = False) -> str:
        """Takes in one window of steps and moves `frozen`.

        Args:
            norms: The mean gradient norm of each layer that trains, from `frozen` up.
            losses: The training loss of each step, at least two.
            progress: The share of training that is over.
            hold: Freeze nothing now.

        Returns:
            Why `frozen` moved, or "" where it did not.
        """
        level = [fmean(losses), variance(losses) / len(losses)]
        before, self._before = self._before, list(norms)
        if self.frozen and self._loss is not None and self._rises(level):
            self._thaws += 1
            self._rest = 4 * 2 ** (self._thaws - 1)
            was, now = self._loss[0], level[0]
            self.thaw()
            return f"the loss rose from {was:.4g} to {now:.4g} since layers were frozen, so all of them train again"
        if self._rest:
            self._rest -= 1
            return ""
        if hold or progress < self.begin:
            return ""
        if self.by == "unfreezing":
            old = self.frozen
            self.frozen = min(old, self._by_unfreezing(progress))
            return f"{progress:.0%} of training are over" if self.frozen < old else ""
        if self.by == "turns":
            return self._next_turn(level)
        old = self.frozen
        self.frozen = max(old, self._by_schedule(progress) if self.by == "schedule" else self._by_signal(before))
        if self.frozen == old:
            return ""
        self._loss, self._before = level, self._before[self.frozen - old :]
        if self.by == "schedule":
            return f"{progress:.0%} of training are over"
        return "their gradients change less than those of the median layer"

    def _next_turn(self, level: list[float]) -> str:
        self._turn = self._turn % self.every + 1
        if self._turn == self.every:
            self.thaw()
            return "it is their turn to train"
        if self.frozen:
            return ""
        self.frozen, self._loss, self._before = self.most, level, None
        return f"they train in one of {self.every} turns"

    def _rises(self, level: list[float]) -> bool:
        assert self._loss is not None
        error = math.sqrt(level[1] + self._loss[1])
        return level[0] - self._loss[0] > 3 * error

    def _by_schedule(self, progress: float) -> int:
        return min(self.most, int(self.most * (progress - self.begin) / (self.end - self.begin) + 1e-9) + 1)

    def _by_unfreezing(self, progress: float) -> int:
        return self.most - (self._by_schedule(progress) if progress >= self.begin else 0)

    def _by_signal(self, before: list[float] | None) -> int:
        now = self._before
        if before is None or now is None or len(before) != len(now):
            return self.frozen
        rates = [abs(old - new) / old if old > 0 else 0.0 for old, new in zip(before, now, strict=True)]
        middle = median(rates)
        more = next((i for i, rate in enumerate(rates) if rate > middle), len(rates))
        return min(self.most, self.frozen + more)

    def thaw(self) -> None:
        """Lets all layers train, and begins anew."""
        self.frozen = 0
        self._before = self._loss = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain Python."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with it."""
        for name in _STATE:
            setattr(self, name, state_dict[name])


_STATE = ("frozen", "_before", "_loss", "_rest", "_thaws", "_turn")
