"""Where a run can be stopped so that a checkpoint taken there resumes with nothing lost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakKeyDictionary


def work_follows_batch(trainer: Any) -> bool:
    """In `on_train_batch_end`: whether validation, the end of the epoch or the end of training comes next.

    A run resumed from a checkpoint taken here goes on with the next batch: measured on Lightning 2.6, it leaves out
    a validation that was due, `on_train_epoch_end` and the next `on_train_epoch_start`.
    """
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    return bool(
        epoch_loop.batch_progress.is_last_batch
        or epoch_loop._is_training_done
        or trainer.should_stop
        or epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
    )


_MOVED: WeakKeyDictionary[Any, tuple[list[Any], list[Any]]] = WeakKeyDictionary()  # the order found, and who has moved


def run_last(trainer: Any, callback: Any) -> Callable[[], None]:
    """Moves `callback` behind all others, `ModelCheckpoint` included, so that it sees what they did in a hook.

    Returns:
        What undoes it: once all that have moved have come back, the order is what it was.
    """
    found, moved = _MOVED.setdefault(trainer, (list(trainer.callbacks), []))
    moved.append(callback)
    # A new list: Lightning is iterating over the old one.
    trainer.callbacks = [*(other for other in trainer.callbacks if other is not callback), callback]

    def undo() -> None:
        moved[:] = [other for other in moved if other is not callback]
        if not moved:
            added = [other for other in trainer.callbacks if not any(other is known for known in found)]
            trainer.callbacks = [*found, *added]
            _MOVED.pop(trainer, None)

    return undo


def run_before(trainer: Any, callback: Any, names: Collection[str]) -> None:
    """Moves `callback` before the first callback whose class has one of the names; where there is none, nowhere."""
    others = [other for other in trainer.callbacks if other is not callback]
    place = next((i for i, other in enumerate(others) if type(other).__name__ in names), None)
    if place is not None and place < trainer.callbacks.index(callback):
        trainer.callbacks = [*others[:place], callback, *others[place:]]
