"""Where in an epoch training is: what a resumable loader needs to know.

`fit_loop.epoch_loop.batch_progress` counts a batch as processed once its step is done; a checkpoint written in the
middle of a step does not count that batch.
"""

from __future__ import annotations

from typing import Any


def batches_trained(trainer: Any) -> int:
    """Returns how many batches of the current epoch were trained on, on this rank."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.processed)
