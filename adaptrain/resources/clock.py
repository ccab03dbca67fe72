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
    waited, busy, began = _waited_s(), time.thread_time(), time.perf_counter()
    result = run()
    _finish(device)
    seconds = time.perf_counter() - began
    busy, waited = time.thread_time() - busy, _waited_s() - waited
    # Waiting between two readings of the clocks, and not in the call, would else make it too short.
    return result, max(seconds - waited, min(busy, seconds))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _waited_s() -> float:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(_SCHEDULER.read_text().split()[1]) / 1e9
    return 0.0
