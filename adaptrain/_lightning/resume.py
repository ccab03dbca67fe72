"""Where a resumed run meets the uninterrupted one: between loading the checkpoint and the first batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replay_random_state(
    trainer: Any, *, restore: Callable[[], bool], capture: Callable[[], Callable[[], None]]
) -> Callable[[], None]:
    """Puts the random state where the uninterrupted run had it when it fetched the batch after the checkpoint.

    Making a loader's iterator draws random numbers (the workers' seed, a shuffled order). An uninterrupted run makes
    one between the checkpoint and the next batch where an epoch begins in between, and none in the middle of an epoch.
    A resumed run always makes some when it sets up its data, and at some stops another when the epoch begins. This
    evens that out: it wraps `fit_loop.setup_data` and, in it, `_load_combined_loader_states`, which comes right before
    the iterator is made, and `fit_loop.epoch_loop.on_run_start`, which comes right before the first fetch.

    Args:
        trainer: The trainer, before its data is set up.
        restore: Sets the random state of the checkpoint and returns True; once the first batch has begun, or where
            there is none to restore, does nothing and returns False.
        capture: Returns what sets the random state of now again.

    Returns:
        What takes the wraps off.
    """
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    setup_data, load_states = fit_loop.setup_data, fit_loop._load_combined_loader_states
    on_run_start = epoch_loop.on_run_start
    restored_in_setup = False
    after_setup: Callable[[], None] | None = None

    def replayed_load_states() -> None:
        nonlocal restored_in_setup
        load_states()
        restored_in_setup = restore()

    def replayed_setup_data() -> None:
        nonlocal restored_in_setup, after_setup
        restored_in_setup = False
        setup_data()
        if restored_in_setup:  # not where the data was set up already
            after_setup = capture()

    def replayed_on_run_start(data_fetcher: Any) -> None:
        combined_loader = data_fetcher.combined_loader
        iterator = combined_loader._iterator
        pending = restore()
        on_run_start(data_fetcher)
        epoch_begins = epoch_loop.batch_progress.current.ready == 0
        if pending and epoch_begins and combined_loader._iterator is iterator and after_setup is not None:
            after_setup()  # this epoch's iterator was made when the data was set up

    wraps = (
        (fit_loop, "_load_combined_loader_states", replayed_load_states),
        (fit_loop, "setup_data", replayed_setup_data),
        (epoch_loop, "on_run_start", replayed_on_run_start),
    )
    for loop, name, wrap in wraps:
        setattr(loop, name, wrap)

    def undo() -> None:
        for loop, name, wrap in wraps:
            if vars(loop).get(name) is wrap:  # else another has wrapped it since, around ours
                delattr(loop, name)

    return undo
