"""The training-step seam: what `training_step` returns, changed for every batch and micro-batch alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def wrap_training_step(pl_module: Any, around: Callable[[Callable[[], Any]], Any]) -> Callable[[], None]:
    """Runs `around(step)` in the place of every `training_step`.

    It holds under whatever runs the step: Lightning's closure, a distributed wrapper, or micro-batches.

    Args:
        pl_module: The module, before its first batch.
        around: Gets the step as a function without arguments; what it returns becomes the step's output.

    Returns:
        A function that undoes it, unless another wrapper was put around this one since.
    """
    replaced = pl_module.__dict__.get("training_step")
    original = pl_module.training_step

    @wraps(original)  # Lightning reads the signature
    def training_step(*args: Any, **kwargs: Any) -> Any:
        return around(lambda: original(*args, **kwargs))

    def undo() -> None:
        if pl_module.__dict__.get("training_step") is not training_step:
            return
        del pl_module.training_step
        if replaced is not None:
            pl_module.training_step = replaced

    pl_module.training_step = training_step
    return undo
