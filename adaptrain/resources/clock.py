"""How long a call takes, whoever else uses the processor meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["timed"]

Result = TypeVar("Result")

_SCHEDULER = Path("/proc/thread-self/schedstat")


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Runs a call, and measures it without the time in which its thread was ready and waited for a core.

    Where programs share a core each has it for some milliseconds in turn: by the wall clock a call of 4 ms takes 8,
    and one of 2 ms mostly 2. What the thread sleeps, and waits for a GPU or for other threads, counts.
    Source: the run delay of Linux, https://docs.kernel.org/scheduler/sched-stats.html. Where it is not counted, and
    on other systems, it is the wall time.

    Args:
        run: The call.
        device: Where it computes; what it has started on a GPU is waited for.

    Returns:
        What the call returns, and its seconds.
    """
    _finish(device)
    waited_before, missed_before = _waited_s()
    busy, began = time.thread_time(), time.perf_counter()
    result = run()
    _finish(device)
    seconds, busy = time.perf_counter() - began, time.thread_time() - busy
    waited_after, missed_after = _waited_s()
    waited = max(0.0, waited_after - waited_before - missed_before - missed_after)
    return result, max(seconds - waited, min(busy, seconds))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _waited_s() -> tuple[float, float]:
    """Returns the thread's waiting so far, and that of this reading: it is not of the call."""
    began, busy, waited = time.perf_counter(), time.thread_time(), 0.0
    with contextlib.suppress(OSError, IndexError, ValueError):
        waited = int(_SCHEDULER.read_text().split()[1]) / 1e9
    busy = time.thread_time() - busy
    return waited, max(0.0, time.perf_counter() - began - busy)
