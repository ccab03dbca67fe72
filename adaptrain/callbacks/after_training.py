"""What callbacks do with the module once training is over, within the memory that training kept to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adaptrain import _lightning
from adaptrain._lightning import nested
from adaptrain.callbacks.batch_size import BatchSizeController
from adaptrain.execution.oom import attempt

FOLDER = "after_training"  # in the run's folder: what was decided meanwhile, where anything was

_ARGUMENTS = (
    *("micro_batch_size", "split_by", "pad_to_multiple_of", "weight_by"),
    *("memory_limit_gib", "memory_fraction", "split"),
)


def controllers_like(trainer: Any) -> list[BatchSizeController]:
    """Returns a controller like each of the trainer's, for a second trainer of the same module."""
    return [
        BatchSizeController(**{name: getattr(callback, name) for name in _ARGUMENTS}, name=callback.name)
        for callback in trainer.callbacks
        if isinstance(callback, BatchSizeController) and not callback.dry_run
    ]


def validate_again(trainer: Any, pl_module: Any) -> dict[str, float]:
    """Validates a module on the trainer's validation data; batches that do not fit run in pieces where they did before.

    Call it on every rank once `trainer` has trained, in `teardown`.

    Returns:
        What the module logged, by name; empty where it has no validation.
    """
    folder = _lightning.run_folder(trainer) / FOLDER
    return nested.validate_again(trainer, pl_module, callbacks=controllers_like(trainer), default_root_dir=folder)


def attempt_together(run: Callable[[], Any], pl_module: Any, *, host_bytes: int = 0) -> tuple[Any, str | None]:
    """Runs something on every rank that may run out of memory, as `adaptrain.execution.oom.attempt` does.

    Where one rank has too little memory to begin none does, and what one could not finish none has.

    Returns:
        What it returned, and None; or None, and what was lacking.
    """

    def on_any(lack: str | None) -> bool:
        return _lightning.all_reduce([float(lack is not None)], op="max", device=pl_module.device)[0] > 0

    found, (_, lack) = None, attempt(lambda: None, host_bytes=host_bytes)
    if not on_any(lack):
        found, lack = attempt(run)
        if not on_any(lack):
            return found, None
    return None, lack or "on another rank"
