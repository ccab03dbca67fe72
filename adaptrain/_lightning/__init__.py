"""The only package that imports Lightning or touches its private seams.

Users have `pytorch_lightning`, `lightning.pytorch`, or both, and the two do not accept each other's classes.
`Callback` here derives from every one that is installed, so that one callback serves both trainers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pytorch_lightning import LightningDataModule, LightningModule, Trainer, seed_everything

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:

    def _callback_bases() -> tuple[type, ...]:
        bases = [import_module("pytorch_lightning").Callback]
        if find_spec("lightning") is not None and find_spec("lightning.pytorch") is not None:
            bases.append(import_module("lightning.pytorch").Callback)
        return tuple(bases)

    class Callback(*_callback_bases()):
        """A callback that the trainers of both Lightning namespaces accept."""


from adaptrain._lightning.loader import share_of_data
from adaptrain._lightning.position import batches_trained
from adaptrain._lightning.resume import replay_random_state
from adaptrain._lightning.stop import run_before, run_last, work_follows_batch
from adaptrain._lightning.trainer import (
    all_gather,
    all_reduce,
    at_step_boundary,
    broadcast,
    is_rank_zero,
    pads_to,
    progress,
    refuse_endless,
    refuse_sharded,
    refuse_unsupported,
    resume_step,
    run_folder,
    sum_over_ranks,
    total_steps,
)

__all__ = [
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "all_gather",
    "all_reduce",
    "at_step_boundary",
    "batches_trained",
    "broadcast",
    "is_rank_zero",
    "pads_to",
    "progress",
    "refuse_endless",
    "refuse_sharded",
    "refuse_unsupported",
    "replay_random_state",
    "resume_step",
    "run_before",
    "run_folder",
    "run_last",
    "seed_everything",
    "share_of_data",
    "sum_over_ranks",
    "total_steps",
    "work_follows_batch",
]
