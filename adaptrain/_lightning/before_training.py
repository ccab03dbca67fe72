"""What there is before training begins: the model, the data that fit was given, and what a module says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def configure_model(trainer: Any, pl_module: Any) -> Callable[[], None] | None:
    """Has a module make its layers in `setup`, which Lightning does right after it: whoever looks at them is too early.

    It makes them once. The hook is to give the same layers when it is called again, as Lightning asks of it, but one
    that does not would leave a callback with layers that are of no model.

    Args:
        trainer: The trainer, in `setup`.
        pl_module: The module.

    Returns:
        A function that gives the hook back; None where there is no hook, or it was called for another callback.
    """
    hook = pl_module.configure_model
    if hook is _configured or getattr(hook, "__qualname__", "") == "ModelHooks.configure_model":
        return None
    strategy, precision = trainer.strategy, trainer.precision_plugin
    with strategy.tensor_init_context(), strategy.model_sharded_context(), precision.module_init_context():
        hook()
    pl_module.configure_model = _configured
    return lambda: pl_module.__dict__.pop("configure_model", None)


def _configured() -> None:
    """Stands in for a hook that has been called."""


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
