"""Where a run can be stopped so that a checkpoint taken there resumes with nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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


def run_last(trainer: Any, callback: Any) -> Callable[[], None]:
    """Moves `callback` behind all others, `ModelCheckpoint` included, so that it sees what they did in a hook.

    Returns:
        What moves it back.
    """
    place = trainer.callbacks.index(callback)
    # A new list: Lightning is iterating over the old one.
    trainer.callbacks = [*(other for other in trainer.callbacks if other is not callback), callback]

    def undo() -> None:
        others = [other for other in trainer.callbacks if other is not callback]
        trainer.callbacks = [*others[:place], callback, *others[place:]]

    return undo
