"""Seams for a model whose shapes change: wrapping, loading weights, copies of it, and when validation comes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import nn
from torch.optim.swa_utils import AveragedModel


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


def before_hook(
    owner: Any,
    hook: Literal["on_load_checkpoint", "on_save_checkpoint", "configure_optimizers", "on_run_end"],
    prepare: Callable[..., object],
) -> Callable[[], None]:
    """Calls `prepare` with the arguments of a hook before the hook, which still runs.

    Of a LightningModule: a callback's own `on_load_checkpoint` comes after the weights are loaded, the module's before;
    a callback's `on_save_checkpoint` is left out where only weights are saved, the module's is not. Before
    `configure_optimizers` Lightning has moved the module to its device, has loaded the weights of a checkpoint, and has
    wrapped it for distributed training; its data is set up. Of a trainer's `fit_loop`: `on_run_end` comes before any
    callback's `on_train_end`.

    Args:
        owner: The module, or the loop.
        hook: The hook's name.
        prepare: What to do first.

    Returns:
        A function that undoes it.
    """
    replaced = owner.__dict__.get(hook)
    original = getattr(owner, hook)

    def wrapped(*args: Any) -> Any:
        prepare(*args)
        return original(*args)

    def undo() -> None:
        owner.__dict__.pop(hook, None)
        if replaced is not None:
            setattr(owner, hook, replaced)

    setattr(owner, hook, wrapped)
    return undo


def validation_follows(trainer: Any) -> bool:
    """In `on_train_batch_end`: whether Lightning validates right after this batch."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def averaged_copies(trainer: Any, pl_module: Any) -> list[Any]:
    """Returns the running averages of the model that others keep: their shapes have to follow its own.

    Those are torch's `AveragedModel`s that a callback or the module holds, as in Lightning's `WeightAveraging`, and the
    copy that Lightning's `StochasticWeightAveraging` makes.
    """
    copies: list[Any] = []
    for callback in trainer.callbacks:
        for name, value in vars(callback).items():
            if isinstance(value, AveragedModel):
                copies.append(value.module)
            elif name == "_average_model" and isinstance(value, nn.Module):
                copies.append(value)
    holders = (pl_module, *copies)
    return copies + [each.module for held in holders for each in held.modules() if isinstance(each, AveragedModel)]


def is_compiled(pl_module: Any) -> bool:
    """Whether the module or a part of it runs through torch.compile."""
    return getattr(pl_module, "_compiler_ctx", None) is not None or any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in pl_module.modules()
    )


def forget_compiled(pl_module: Any) -> None:
    """Makes torch compile anew what was compiled for other shapes; nothing is done where nothing is compiled."""
    if is_compiled(pl_module):
        import torch._dynamo  # costs a second, and is there already where something is compiled

        torch._dynamo.reset()
