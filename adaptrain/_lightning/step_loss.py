"""The loss of the batch that ends an accumulation window, told before the optimizer takes its step.

Lightning hands `outputs["loss"]` to callbacks in `on_train_batch_end`: early enough for the other batches of the
window, but after the optimizer step for its last. So the closure given to `_optimizer_step` is wrapped for that one.
However the batch is run inside it (in parts, again after a failure), its loss is told once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def tell_step_loss(trainer: Any, tell: Callable[[Tensor | None], object]) -> Callable[[], None]:
    """Calls `tell` with the loss of a window's last batch, after its backward and before `on_before_optimizer_step`.

    Args:
        trainer: A trainer with automatic optimization.
        tell: Gets the detached loss as Lightning holds it, divided by `accumulate_grad_batches`; None where
            `training_step` returned None.

    Returns:
        What undoes it.

    Raises:
        RuntimeError: Lightning has moved the seam.
    """
    loop = getattr(trainer.fit_loop.epoch_loop, "automatic_optimization", None)
    inner = getattr(loop, "_optimizer_step", None)
    if loop is None or inner is None:
        raise RuntimeError("This version of Lightning has no automatic_optimization._optimizer_step to wrap.")

    def optimizer_step(batch_idx: int, closure: Callable[..., Tensor | None]) -> None:
        def told(*args: Any, **kwargs: Any) -> Tensor | None:
            loss = closure(*args, **kwargs)
            tell(loss)
            return loss

        inner(batch_idx, told)

    def undo() -> None:
        if loop.__dict__.get("_optimizer_step") is optimizer_step:
            del loop._optimizer_step

    loop._optimizer_step = optimizer_step
    return undo
