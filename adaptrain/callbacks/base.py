"""What every adaptive callback shares: decisions, dry run, and leaving the trainer as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from adaptrain import _lightning
from adaptrain._lightning.before_training import configure_model
from adaptrain.decisions import Decision, DecisionLog

_LOGS: WeakKeyDictionary[Any, DecisionLog] = WeakKeyDictionary()
_FOLDERS: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


def decision_log(trainer: Any) -> DecisionLog:
    """Returns the run's log; its file is `decisions.jsonl` in the run's folder on rank zero.

    Call it on every rank: finding the folder is a collective. After `find_run_folder` one rank may call it alone.
    """
    if trainer not in _LOGS:
        folder = _FOLDERS.get(trainer) or _lightning.run_folder(trainer)
        path = folder / "decisions.jsonl" if _lightning.is_rank_zero(trainer) else None
        _LOGS[trainer] = DecisionLog(path, resume_step=_lightning.resume_step(trainer))
    return _LOGS[trainer]


def find_run_folder(trainer: Any) -> None:
    """Finds where the run's log goes, a collective, and opens no file yet: evaluation mostly decides nothing."""
    if trainer not in _LOGS:
        _FOLDERS[trainer] = _lightning.run_folder(trainer)


class AdaptiveCallback(_lightning.Callback):
    """Base of the callbacks that sense, decide, act and record.

    A subclass reads in a hook, asks a policy, applies the answer unless `dry_run`, and calls `record`. What it
    changes on the trainer it undoes through `on_exit`, also when training fails.

    Args:
        dry_run: Decide and record, change nothing.
        name: Tells two instances of one class apart in a checkpoint; None where there is one.
    """

    def __init__(self, *, dry_run: bool = False, name: str | None = None) -> None:
        super().__init__()
        self.dry_run = dry_run
        self.name = name
        self._exit: list[Callable[[], object]] = []

    @property
    def state_key(self) -> str:
        """The callback's key in a checkpoint."""
        kind = type(self).__qualname__
        return kind if self.name is None else f"{kind}[{self.name}]"

    @property
    def needs_gradients(self) -> bool:
        """Whether it still reads the gradients of all parameters, so that none may be frozen now."""
        return False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Has the model made, and refuses before training what cannot be served."""
        if (undo := configure_model(trainer, pl_module)) is not None:
            self.on_exit(undo)
        if stage == "fit":
            self.check(trainer, pl_module)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Raises `ConfigurationError` for a trainer or module this callback cannot serve."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the run's decision log."""
        decision_log(trainer)

    def record(
        self,
        trainer: Any,
        knob: str,
        *,
        old: Any,
        new: Any,
        reason: str,
        readings: Mapping[str, Any] | None = None,
        offer: bool = True,
    ) -> Decision:
        """Appends a decision to the run's log and offers it to the other adaptive callbacks.

        Call it on every rank, with the same values. A dry run's decision is recorded, marked as not applied, and
        not offered: nothing changed that others should react to. `offer=False` for what is no change during training.

        Returns:
            The decision.
        """
        decision = Decision(
            step=int(trainer.global_step),
            knob=knob,
            old=old,
            new=new,
            reason=reason,
            readings=dict(readings or {}),
            applied=not self.dry_run,
            source=type(self).__name__,
        )
        decision_log(trainer).append(decision)
        if decision.applied and offer:
            for other in trainer.callbacks:
                if other is not self and isinstance(other, AdaptiveCallback):
                    other.on_decision(trainer, trainer.lightning_module, decision)
        return decision

    def announce(self, trainer: Any, knob: str, *, at_end: bool = False) -> None:
        """Tells the other adaptive callbacks that a knob is about to move, while what it moves is still as it was.

        Call it on every rank, not in a dry run.

        Args:
            trainer: The trainer.
            knob: The knob.
            at_end: Training is over, so that no step follows the change.
        """
        for other in trainer.callbacks:
            if other is not self and isinstance(other, AdaptiveCallback):
                other.on_before_change(trainer, trainer.lightning_module, knob, at_end=at_end)

    def on_before_change(self, trainer: Any, pl_module: Any, knob: str, *, at_end: bool = False) -> None:
        """Hears that another adaptive callback is about to move a knob; a decision follows."""

    def on_decision(self, trainer: Any, pl_module: Any, decision: Decision) -> None:
        """Hears what another adaptive callback decided, after it was applied."""

    def on_exit(self, undo: Callable[[], object]) -> None:
        """Registers what to undo when the stage ends, by success or failure; last registered runs first."""
        self._exit.append(undo)

    def _leave(self) -> None:
        with contextlib.ExitStack() as stack:
            for undo in self._exit:
                stack.callback(undo)
            self._exit = []

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the trainer as it was found."""
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leaves the trainer as it was found: Lightning calls no `teardown` after an exception."""
        self._leave()
