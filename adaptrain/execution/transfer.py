"""The transfer of a batch to the device, once more when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adaptrain.execution.oom import DoesNotFitError, attempt


class Transfer:
    """Runs a transfer, and once more with memory freed where it ran out.

    The whole batch must be on the device before it is split: Lightning's hooks around the transfer see it whole.

    Args:
        report: Returns a description of memory.
    """

    def __init__(self, report: Callable[[], str]) -> None:
        self._report = report

    def __call__(self, transfer: Callable[[], Any]) -> Any:
        """Runs `transfer` and returns what it returns.

        Raises:
            DoesNotFitError: It does not fit with memory freed either.
        """
        batch, message = attempt(transfer)
        if message is None:
            return batch
        batch, message = attempt(transfer)
        if message is None:
            return batch
        raise DoesNotFitError(
            f"A batch does not fit on the device: it is transferred whole before it is split. {self._report()} The"
            f" error was: {message}\nWhat to try: a smaller batch_size in the loader, with accumulate_grad_batches to"
            " keep what an optimizer step sees, or a smaller model."
        )
