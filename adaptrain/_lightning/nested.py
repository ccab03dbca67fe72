"""A second trainer for the same module: validates it, or trains it a little more, after the first one's fit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch


@contextlib.contextmanager
def nested_trainer(trainer: Any, pl_module: Any, *, callbacks: Sequence[Any] = (), **settings: Any) -> Iterator[Any]:
    """Yields a quiet trainer like `trainer`, on its devices, that logs and saves nothing.

    Call it on every rank once `trainer` has trained, in `teardown`. Module and data module belong to `trainer` again
    afterwards, and the random state is what it was.

    Args:
        trainer: A trainer of either namespace.
        pl_module: Its module.
        callbacks: The second trainer's callbacks; those of `configure_callbacks` are left out.
        **settings: Of the second trainer.
    """
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    own: dict[str, Any] = {
        "accelerator": "gpu" if on_gpu else device.type,
        "devices": trainer.device_ids if on_gpu else trainer.num_devices,
        "num_nodes": trainer.num_nodes,
        "strategy": "auto" if trainer.world_size == 1 else "ddp",
        "use_distributed_sampler": False,  # the loaders are those of `trainer`, which share the samples already
        "precision": trainer.precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": trainer.limit_val_batches,
        "default_root_dir": trainer.default_root_dir,  # nothing is written there unless a callback does
    }
    data = trainer.datamodule
    trained_by = None if data is None else data.trainer
    configured = pl_module.__dict__.get("configure_callbacks")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(torch.random.fork_rng(devices=[device] if on_gpu else []))
        pl_module.configure_callbacks = list
        try:
            yield type(trainer)(callbacks=list(callbacks), **(own | settings))
        finally:
            if configured is None:
                del pl_module.configure_callbacks
            else:
                pl_module.configure_callbacks = configured
            pl_module.trainer = trainer
            if data is not None:
                data.trainer = trained_by


def validate_again(trainer: Any, pl_module: Any, *, callbacks: Sequence[Any] = (), **settings: Any) -> dict[str, float]:
    """Validates a module on the trainer's validation data, as the module itself does.

    Call it on every rank once `trainer` has trained, in `teardown`.

    Args:
        trainer: A trainer of either namespace.
        pl_module: Its module.
        callbacks: Of the trainer that validates.
        **settings: Of the trainer that validates.

    Returns:
        What the module logged, by name; empty where it has no validation.
    """
    loaders = trainer.val_dataloaders
    if loaders is None:
        return {}
    with nested_trainer(trainer, pl_module, callbacks=callbacks, **settings) as nested:
        # The module is as training left it. A copy in lower precision inside of it stays as it is, too.
        nested.precision_plugin.convert_module = lambda module: module
        found = nested.validate(pl_module, dataloaders=loaders, verbose=False)
    return {name: float(value) for result in found for name, value in result.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No word of the devices there are, nor of why a trainer stopped."""
    names = [f"{package}.utilities.rank_zero" for package in ("pytorch_lightning", "lightning.pytorch")]
    loggers = [logging.getLogger(name) for name in (*names, "lightning_fabric.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
