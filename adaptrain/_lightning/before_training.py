"""What there is to see before training begins: the data that fit was given, and what a module says of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def train_dataloader(trainer: Any) -> Any:
    """Returns the training data that fit was given, before it is set up: whatever the user's code makes of it."""
    return trainer.fit_loop._data_source.dataloader()


def loss_of(trainer: Any, pl_module: Any, batch: Any) -> Tensor | None:
    """Returns what `training_step` says of a batch before training has begun; nothing is logged.

    Args:
        trainer: The trainer, in fit.
        pl_module: The module, on its device.
        batch: A batch as the loader makes it.
    """
    names = ("log", "log_dict")
    replaced = {name: pl_module.__dict__.get(name) for name in names}
    for name in names:  # there is no loop yet that could take what is logged
        setattr(pl_module, name, lambda *args, **kwargs: None)
    try:
        moved = trainer.strategy.batch_to_device(batch)
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            output = pl_module.training_step(moved, 0)
    finally:
        for name in names:
            pl_module.__dict__.pop(name, None)
            if replaced[name] is not None:
                setattr(pl_module, name, replaced[name])
    return output.get("loss") if isinstance(output, dict) else output
