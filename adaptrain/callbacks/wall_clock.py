"""Ends training when its time is spent, and tells the schedules how much of it is."""

from __future__ import annotations

import math
import time
from typing import Any

from adaptrain import _lightning
from adaptrain.budget import Progress
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.decisions import Decision
from adaptrain.errors import ConfigurationError


class WallClock(AdaptiveCallback):
    """Stops training when its wall-clock time is spent, and answers how much of the run is.

    The clock runs from the start of training to its end, with the validation in between, and goes on counting in a
    resumed run. Training stops at the step boundary from which another step (as long as the longest of the last
    few) would not fit. What follows is not cut: Lightning still validates once, and tests where asked, so leave room
    for them. Lightning finishes `min_epochs` or `min_steps` first where the trainer sets them.

    `progress_fraction` is the larger of the share of steps and the share of time, so schedules that run on it end
    where training ends. All ranks see rank zero's clock, taken once per optimizer step.

    Args:
        minutes: Minutes training may take, greater than 0. None: no limit, progress is the share of steps.
        dry_run: Record when training would stop, and let it go on; progress is the share of steps.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: `minutes` is not a number greater than 0.
    """

    def __init__(self, *, minutes: float | None = None, dry_run: bool = False, name: str | None = None) -> None:
        super().__init__(dry_run=dry_run, name=name)
        if minutes is not None and (
            isinstance(minutes, bool)
            or not isinstance(minutes, (int, float))
            or not math.isfinite(minutes)
            or minutes <= 0
        ):
            raise ConfigurationError(
                f"WallClock: minutes must be a number greater than 0, or None for no limit; got {minutes!r}."
            )
        self.minutes = minutes
        self._elapsed = 0.0  # seconds, as all ranks know it: at the last step boundary
        self._offset = 0.0  # seconds of earlier runs
        self._started: float | None = None
        self._recent: list[float] = []  # seconds of the last few steps
        self._spent = False
        self._progress: Progress | None = None

    @property
    def limit_s(self) -> float | None:
        """Seconds training may take; None where no limit holds."""
        return None if self.minutes is None or self.dry_run else 60 * self.minutes

    def progress_fraction(self, trainer: Any) -> float:
        """Returns the share of the run that is spent, in [0, 1], the same on every rank.

        Args:
            trainer: The trainer, once it can tell its number of steps (from `configure_optimizers` on).
        """
        limit = self.limit_s
        if (share := _lightning.share_of_data(trainer)) is not None:
            return max(share, Progress(wall_clock_s=limit).fraction(step=0, elapsed_s=self._elapsed))
        if self._progress is None:
            # Lightning counts batches anew at each call, so its answer is kept.
            self._progress = Progress(total_steps=_lightning.total_steps(trainer), wall_clock_s=limit)
        return self._progress.fraction(step=int(trainer.global_step), elapsed_s=self._elapsed)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets what an earlier fit knew."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._progress = None
            self._recent = []
            self._elapsed = self._offset = 0.0
            self._spent = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At a step boundary: reads the clock, and stops training where the next step would not fit."""
        if self.minutes is None or not _lightning.at_step_boundary(trainer):
            return
        before, now = self._elapsed, self._now()
        self._elapsed = _lightning.all_reduce(
            [now if _lightning.is_rank_zero(trainer) else 0.0], op="max", device=pl_module.device
        )[0]
        self._recent = [*self._recent[-4:], self._elapsed - before]
        limit = 60 * self.minutes
        if self._spent or self._elapsed + max(self._recent) <= limit:
            return
        self._spent = True
        total = _lightning.total_steps(trainer)
        reached = f"{trainer.global_step} of {total}" if total else f"{trainer.global_step}"
        self.record(
            trainer,
            "wall_clock",
            old=total,
            new=int(trainer.global_step),
            reason=f"{self._elapsed / 60:.3g} of {self.minutes:g} minutes are spent after {reached} steps;"
            " another step would not fit, so training stops",
            readings={"elapsed_s": self._elapsed, "limit_s": limit, "step_s": max(self._recent)},
        )
        if not self.dry_run:
            trainer.should_stop = True

    def on_decision(self, trainer: Any, pl_module: Any, decision: Decision) -> None:
        """Counts the steps anew after a change of the global batch size."""
        if decision.knob == "global_batch_size":
            self._progress = None

    def _now(self) -> float:
        return self._offset + (time.monotonic() - self._started if self._started is not None else 0.0)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stops the clock."""
        self._offset, self._started = self._now(), None

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds spent so far."""
        return {"elapsed_s": self._now()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting from where the saved run was."""
        self._offset = self._elapsed = float(state_dict["elapsed_s"])
