"""What callbacks do with the module once training is over, within the memory that training kept to."""

from __future__ import annotations

from typing import Any

from adaptrain import _lightning
from adaptrain._lightning import nested
from adaptrain.callbacks.batch_size import BatchSizeController

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
