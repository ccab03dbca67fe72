"""Seams for a model whose shapes change: distributed wrapping, loading weights, and when validation comes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def unwrapped(trainer: Any) -> Iterator[None]:
    """Takes the model out of its distributed wrapper, and wraps it anew at the end.

    `DistributedDataParallel` lays out its gradient buckets by the shapes it finds when it wraps. A collective: enter
    and leave it on every rank.

    Args:
        trainer: The trainer, in fit. Nothing is done where its strategy does not wrap the model.
    """
    strategy = trainer.strategy
    wrapped = strategy.model is not strategy.lightning_module
    if wrapped:
        strategy.model = strategy.lightning_module
        gc.collect()  # the old wrapper's hooks on the parameters go with it
    try:
        yield
    finally:
        if wrapped:
            strategy.configure_ddp()


def before_weights_load(pl_module: Any, prepare: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    """Calls `prepare(checkpoint)` before a trainer loads weights into a module.

    A callback's own `on_load_checkpoint` comes after the weights; the module's comes before.

    Args:
        pl_module: The module; its own `on_load_checkpoint` still runs.
        prepare: What to do with the checkpoint first.

    Returns:
        A function that undoes it.
    """
    replaced = pl_module.__dict__.get("on_load_checkpoint")
    original = pl_module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        prepare(checkpoint)
        original(checkpoint)

    def undo() -> None:
        if replaced is None:
            pl_module.__dict__.pop("on_load_checkpoint", None)
        else:
            pl_module.on_load_checkpoint = replaced

    pl_module.on_load_checkpoint = on_load_checkpoint
    return undo


def validation_follows(trainer: Any) -> bool:
    """In `on_train_batch_end`: whether Lightning validates right after this batch."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
