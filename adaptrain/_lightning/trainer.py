"""Facts about a running trainer, read in one place.

Nothing here checks a Lightning class: a trainer of either namespace has these attributes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from adaptrain._lightning.loader import share_of_data
from adaptrain.errors import ConfigurationError


def is_rank_zero(trainer: Any) -> bool:
    """Whether this process is the one that writes files."""
    return bool(trainer.is_global_zero)


def total_steps(trainer: Any) -> int | None:
    """Optimizer steps the run will take, or None where only time or a stop condition ends it."""
    estimated = trainer.estimated_stepping_batches
    return int(estimated) if math.isfinite(estimated) and estimated > 0 else None


def progress(trainer: Any) -> float:
    """The share of the run that is spent, in [0, 1].

    A `WallClock` callback answers with its own clock counted in; without one it is the share of optimizer steps, or of
    samples where the batch size may change.
    """
    for callback in trainer.callbacks:
        spent = getattr(callback, "progress_fraction", None)
        if callable(spent):
            return float(spent(trainer))  # pyright: ignore[reportArgumentType]
    if (share := share_of_data(trainer)) is not None:
        return share
    total = total_steps(trainer)
    return min(1.0, trainer.global_step / total) if total else 0.0


def resume_step(trainer: Any) -> int | None:
    """The optimizer step that a fit resumes from, or None for a new run.

    In `on_fit_start` the trainer still counts from 0: the checkpoint is open, but its loops are not restored. A
    checkpoint that is evaluated resumes nothing.
    """
    if not trainer.ckpt_path or trainer.state.fn != "fit":
        return None
    opened = trainer._checkpoint_connector._loaded_checkpoint
    return int(opened["global_step"]) if opened else int(trainer.global_step)


def pads_to(given: int | Literal["auto"] | None, trainer: Any) -> int:
    """What lengths of sequences are a multiple of, by an argument `pad_to_multiple_of`; None stands for 1.

    `"auto"` is 8 in 16-bit precision, else 1, as without a trainer: there tensor cores want it (NVIDIA, "Train with
    mixed precision"), and on a CPU oneDNN, which builds a kernel for every shape, then meets few enough to keep them.
    """
    if given == "auto":
        return 8 if trainer is not None and "16" in str(trainer.precision) else 1
    return given or 1


def at_step_boundary(trainer: Any) -> bool:
    """In `on_train_batch_end`: whether the batch just done ended an accumulation window with an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def run_folder(trainer: Any) -> Path:
    """Where the run's files go: the logger's folder, else the trainer's root. Call it on every rank."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def broadcast(trainer: Any, value: Any) -> Any:
    """Returns rank zero's `value` on every rank. A collective: call it on every rank."""
    return trainer.strategy.broadcast(value)


def _is_alone() -> bool:
    """Whether there is no other rank."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def all_reduce(
    values: list[float], *, op: Literal["mean", "sum", "max", "min"] = "mean", device: Any = None
) -> list[float]:
    """Reduces a few numbers over the ranks, so that all of them decide alike.

    Args:
        values: Numbers of this rank, the same count on every rank.
        op: `"mean"`, `"sum"`, `"max"` or `"min"`.
        device: Where to reduce; None: the CPU. NCCL needs the rank's CUDA device.

    Returns:
        The reduced numbers; `values` itself in a single process.
    """
    if _is_alone():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    kinds = {
        "mean": dist.ReduceOp.SUM,
        "sum": dist.ReduceOp.SUM,
        "max": dist.ReduceOp.MAX,
        "min": dist.ReduceOp.MIN,
    }
    dist.all_reduce(tensor, op=kinds[op])
    if op == "mean":
        tensor /= dist.get_world_size()
    return tensor.tolist()


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """Sums a tensor over the ranks in place. A collective: call it on every rank."""
    if not _is_alone():
        dist.all_reduce(tensor)


def all_gather(value: Any) -> list[Any]:
    """Returns every rank's `value`, which must pickle, in order of rank. A collective: call it on every rank."""
    if _is_alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def refuse_unsupported(trainer: Any, pl_module: Any, *, callback: str) -> None:
    """Refuses, before training, what the seams cannot serve.

    Args:
        trainer: The trainer.
        pl_module: The user's LightningModule.
        callback: The callback's class name, for the message.

    Raises:
        ConfigurationError: Manual optimization, or a strategy that shards parameters (FSDP, DeepSpeed).
    """
    if not pl_module.automatic_optimization:
        raise ConfigurationError(
            f"{callback} needs Lightning's automatic optimization, but {type(pl_module).__name__} sets"
            " automatic_optimization=False. Return the loss from training_step, or leave this callback out."
        )
    refuse_sharded(trainer, callback=callback)


def refuse_endless(trainer: Any, *, user: str) -> None:
    """Refuses a run whose length nothing tells: what is planned along it would never come.

    Args:
        trainer: The trainer, from `configure_optimizers` on.
        user: Who plans along the run, for the message.

    Raises:
        ConfigurationError: Neither steps nor a `WallClock` limit it ahead, as with a loader of unknown length.
    """
    if share_of_data(trainer) is not None or 0 <= trainer.estimated_stepping_batches < math.inf:
        return
    if not any(getattr(other, "limit_s", None) for other in trainer.callbacks):
        raise ConfigurationError(
            f"{user} plans along the run, but nothing tells how long it is: max_steps={trainer.max_steps},"
            f" max_epochs={trainer.max_epochs}, and batches of an epoch: {trainer.num_training_batches}. Set"
            " Trainer(max_steps=<n>), or add adaptrain.WallClock(minutes=<m>), which also takes the place of max_time."
        )


def refuse_sharded(trainer: Any, *, callback: str) -> None:
    """Raises `ConfigurationError` for a strategy that shards parameters: its ranks must all run the same forwards."""
    strategy = type(trainer.strategy).__name__
    if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel", "XLA")):
        raise ConfigurationError(
            f"{callback} does not serve the strategy {strategy}: its parameters are sharded over the ranks."
            " Use strategy='auto' or 'ddp', or leave this callback out."
        )
