"""What `BatchSizeController` refuses: wrong arguments, and trainers or machines that it cannot serve."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from adaptrain.errors import ConfigurationError
from adaptrain.execution.memory import GIB, StepMemory


def check_arguments(
    *,
    micro_batch_size: Any,
    split_by: Any,
    pad_to_multiple_of: Any,
    weight_by: Any,
    memory_limit_gib: Any,
    memory_fraction: Any,
    split: Any,
    overlap: Any,
) -> int | None:
    """Checks the controller's arguments, which it describes.

    Returns:
        The micro-batch size that was given; None where it is searched for.

    Raises:
        ConfigurationError: One is out of its range.
    """
    fixed = _checked_size(micro_batch_size)
    if split_by not in ("tokens", "samples"):
        raise ConfigurationError(f"split_by must be 'tokens' or 'samples', got {split_by!r}.")
    if pad_to_multiple_of not in ("auto", None) and not _is_count(pad_to_multiple_of):
        raise ConfigurationError(
            f"pad_to_multiple_of must be 'auto', null or a whole number of at least 1, got {pad_to_multiple_of!r}."
        )
    if not callable(weight_by) and weight_by not in ("auto", "samples", "tokens"):
        raise ConfigurationError(f"weight_by must be 'auto', 'samples', 'tokens' or a callable, got {weight_by!r}.")
    if memory_limit_gib is not None and not (_is_number(memory_limit_gib) and memory_limit_gib > 0):
        raise ConfigurationError(f"memory_limit_gib must be a number of GiB greater than 0, got {memory_limit_gib!r}.")
    if not (_is_number(memory_fraction) and 0 < memory_fraction <= 1):
        raise ConfigurationError(f"memory_fraction must be in (0, 1], got {memory_fraction!r}. The default is 0.9.")
    if split is not None and not callable(split):
        raise ConfigurationError(f"split must be a callable (batch, micro_batch_size) -> micro-batches, got {split!r}.")
    if not isinstance(overlap, bool):
        raise ConfigurationError(f"overlap must be true or false, got {overlap!r}. The default is false.")
    return fixed


def check_training(trainer: Any, pl_module: nn.Module, *, overlap: bool, measures_noise: bool, dry_run: bool) -> None:
    """Refuses an optimizer, module or strategy that cannot be served; warns of batch norm.

    Args:
        trainer: The trainer, in `on_fit_start`.
        pl_module: The user's LightningModule.
        overlap: Whether gradients are reduced while backward runs.
        measures_noise: Whether the ranks' own gradients are needed, too.
        dry_run: Whether nothing will be split.

    Raises:
        ConfigurationError: LBFGS; with several ranks, SyncBatchNorm, a strategy other than DDP, or what does not
            go with `overlap`.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise ConfigurationError(
            "BatchSizeController does not serve LBFGS, which runs the closure several times in one step."
            " Use another optimizer, or leave this callback out."
        )
    parts = dict(pl_module.named_modules())
    if trainer.world_size > 1:
        synced = [name for name, part in parts.items() if isinstance(part, nn.SyncBatchNorm)]
        if synced:
            raise ConfigurationError(
                f"BatchSizeController does not serve SyncBatchNorm ({', '.join(synced)}): it waits for all ranks in"
                " forward, and ranks may run different numbers of micro-batches. Use another norm."
            )
        if not isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel):
            raise ConfigurationError(
                f"BatchSizeController serves several ranks with DistributedDataParallel only, not with"
                f" {type(trainer.strategy).__name__}. Use strategy='ddp', or leave this callback out."
            )
        if overlap and measures_noise:
            raise ConfigurationError(
                "BatchSizeController: overlap=True does not go with GradientNoiseScale on several ranks: it compares"
                " the ranks' own gradients with their mean, and backward then leaves the mean only. Use overlap=False."
            )
        if overlap and trainer.strategy.model.static_graph:
            raise ConfigurationError(
                "BatchSizeController: overlap=True does not go with DDP's static_graph=True: steps differ in their"
                " number of micro-batches. Use overlap=False, or static_graph=False."
            )
    norms = [name for name, part in parts.items() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if norms and not dry_run:
        warnings.warn(
            f"BatchNorm computes its statistics per micro-batch, so that steps differ from unsplit ones:"
            f" {', '.join(norms)}. LayerNorm or GroupNorm do not.",
            stacklevel=3,
        )


def check_memory(memory: StepMemory, *, limit_gib: float | None, fraction: float) -> None:
    """Raises `ConfigurationError` where the process uses more than it may before training has begun.

    Args:
        memory: Measures it.
        limit_gib: The argument `memory_limit_gib`.
        fraction: The argument `memory_fraction`.
    """
    memory.release()
    used, limit = memory.used_bytes(), memory.limit_bytes()
    if used < limit:
        return
    raise ConfigurationError(
        f"The process uses {used / GIB:.2f} GiB before training has begun, and may use {limit / GIB:.2f} GiB"
        f" (memory_limit_gib={limit_gib}, memory_fraction={fraction}). Raise the limit, or"
        " use a smaller model or data set."
    )


def _checked_size(value: Any) -> int | None:
    if value == "auto":
        return None
    if not _is_count(value):
        raise ConfigurationError(
            f"micro_batch_size must be 'auto' or a whole number of samples of at least 1, got {value!r}."
        )
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
