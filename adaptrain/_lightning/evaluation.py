"""The seams of evaluation and of the transfer to the device.

Lightning calls `validation_step`, `test_step` and `predict_step` of the module inside the strategy's context (its
precision, DDP's wrapper). `wrap_evaluation` puts a function in their place on the module: what runs there, once or
several times, is one step to everything outside, so that DDP's own collectives around it stay one per batch.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from adaptrain._lightning.closure import LogBuffer

# What a person calls the stage, and the trainer's properties that tell it, by the module's method.
_STAGES = {
    "validation_step": ("validation", ("validating", "sanity_checking")),
    "test_step": ("test", ("testing",)),
    "predict_step": ("predict", ("predicting",)),
}


class EvaluationStep:
    """One batch on its way through `validation_step`, `test_step` or `predict_step`.

    Attributes:
        batch: What the loader yielded, on the device.
        stage: `"validation"`, `"test"` or `"predict"`.
        loader: The loader's number where there are several, else None.
    """

    def __init__(self, trainer: Any, stage: str, step: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._trainer = trainer
        self._step = step
        self._further = args[1:]
        self.batch = args[0]
        self.stage = stage
        self.loader: int | None = args[2] if len(args) > 2 else None

    def forward(self, batch: Any) -> Any:
        """Runs the module's own step on a micro-batch and returns its output."""
        return self._step(batch, *self._further)

    def logged(self) -> LogBuffer:
        """Returns a buffer for what `self.log` is called with during this step; prediction logs nothing."""
        return LogBuffer(self._trainer._results)


def wrap_evaluation(trainer: Any, pl_module: Any, run: Callable[[EvaluationStep], Any]) -> Callable[[], None]:
    """Puts `run` in the place of the module's evaluation steps while the trainer runs them.

    Calls that are not the trainer's (one step calling another, or a user's own) pass through, and so do steps that
    take a `dataloader_iter`: what it yields cannot be had again.

    Args:
        trainer: A trainer of either namespace.
        pl_module: Its module.
        run: Runs a step and returns its output.

    Returns:
        A function that takes the wrappers off again.
    """
    undos = [_wrap(trainer, pl_module, name, run) for name in _STAGES]

    def undo() -> None:
        for each in undos:
            each()

    return undo


def _wrap(trainer: Any, pl_module: Any, name: str, run: Callable[[EvaluationStep], Any]) -> Callable[[], None]:
    stage, properties = _STAGES[name]
    step = getattr(pl_module, name)
    is_inside = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        is_trainers = not kwargs and args and any(getattr(trainer, name) for name in properties)
        if is_inside or not is_trainers or isinstance(args[0], Iterator):
            return step(*args, **kwargs)
        is_inside = True
        try:
            return run(EvaluationStep(trainer, stage, step, args))
        finally:
            is_inside = False

    function = getattr(step, "__func__", None)
    if function is None:  # an attribute of this module alone, such as a compiled step
        return _shadow(pl_module, name, functools.wraps(step)(call))

    @functools.wraps(function)  # Lightning reads its signature, and whether the user has defined it
    def method(module: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) if module is pl_module else function(module, *args, **kwargs)

    # Bound, so that it follows a copy of the module and pickles with it.
    return _shadow(pl_module, name, types.MethodType(method, pl_module))


def wrap_transfer(trainer: Any, run: Callable[[Callable[[], Any]], Any]) -> Callable[[], None]:
    """Puts `run` around the transfer of every batch to the device, of training and of evaluation.

    Args:
        trainer: A trainer of either namespace.
        run: Given a function that transfers the batch; returns what that returns.

    Returns:
        A function that takes the wrapper off again.

    Raises:
        RuntimeError: Lightning has moved the seam.
    """
    transfer = getattr(trainer.strategy, "batch_to_device", None)
    if transfer is None:
        raise RuntimeError("This version of Lightning has no strategy.batch_to_device to wrap.")

    @functools.wraps(transfer)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return run(functools.partial(transfer, *args, **kwargs))

    return _shadow(trainer.strategy, "batch_to_device", wrapped)


def _shadow(owner: Any, name: str, wrapped: Callable[..., Any]) -> Callable[[], None]:
    before = vars(owner).get(name)
    setattr(owner, name, wrapped)

    def undo() -> None:
        if vars(owner).get(name) is not wrapped:
            return
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo
