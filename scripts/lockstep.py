"""Trainings that take turns step by step in one process, so that a noisy machine slows all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from greenlet import getcurrent, greenlet


class Turn(pl.Callback):
    """Hands over to the next training at the start of every batch. Must be the first of a trainer's callbacks."""

    def __init__(self) -> None:
        self._hub: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._hub.switch()


def lockstep(
    fits: Mapping[str, Callable[[Turn], None]], *, steps: int, seed: int = 0, warmup: int = 2
) -> dict[str, list[float]]:
    """Runs several `Trainer.fit` in turns, one training batch each, in a new random order every round.

    All run in one thread (as greenlets), so that they share torch's threads and caches as one training would.

    Args:
        fits: By name, what runs `fit` with the callback it is given; each must run at least `warmup + steps` batches
            and one more.
        steps: Batches that are timed.
        seed: Of the order.
        warmup: Batches before them.

    Returns:
        By name, the seconds from the start of each timed batch to the start of the next: with loader, all hooks and the
        optimizer's update.
    """
    hub = getcurrent()
    turns = {}
    for name, fit in fits.items():
        turn = Turn()
        turn._hub = hub
        turns[name] = greenlet(lambda fit=fit, turn=turn: fit(turn))
    order, shuffle = list(turns), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in turns}
    for name in order:
        turns[name].switch()  # up to its first batch
    for step in range(warmup + steps):
        shuffle(order)
        for name in order:
            began = time.perf_counter()
            turns[name].switch()
            if step >= warmup:
                times[name].append(time.perf_counter() - began)
    while any(turn for turn in turns.values()):
        for turn in filter(None, turns.values()):
            turn.switch()
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns the median of a few numbers, and the least and the largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
