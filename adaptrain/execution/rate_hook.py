"""A learning rate that is multiplied for the length of an optimizer step and no longer."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class RateHook:
    """Multiplies every group's rate just before the optimizer moves the weights and puts it back just after.

    A scheduler never sees the product, so nothing compounds, whatever it computes its rate from. Lightning runs the
    batch inside `optimizer.step(closure)`; so that the batch, too, sees the scheduler's rate, `multiply` is called at
    the end of the closure. Where there is no closure (a gradient scaler steps the optimizer itself) the hook
    multiplies on entry.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.factor = 1.0
        self._optimizer = optimizer
        self._inside = False
        self._bases: list[tuple[dict[str, Any], Any]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(lambda *_: self.restore()),
        ]

    def multiply(self) -> None:
        """Multiplies the rates if a step is under way; they are put back when it ends."""
        if self._inside and not self._bases:
            self._bases = [(group, group["lr"]) for group in self._optimizer.param_groups]
            for group, base in self._bases:
                group["lr"] = base * self.factor

    def restore(self) -> None:
        """Puts the scheduler's rates back."""
        for group, base in self._bases:
            group["lr"] = base
        self._bases, self._inside = [], False

    def remove(self) -> None:
        """Puts the rates back and takes the hooks off."""
        self.restore()
        for handle in self._handles:
            handle.remove()

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.restore()  # an exception in the last step skipped its post-hook
        self._inside = True
        if len(args) < 2 and kwargs.get("closure") is None:  # torch hands the optimizer itself as args[0]
            self.multiply()
