"""The host probe: memory limits, memory in use, processor use.

Control groups, RLIMIT_AS and procfs are Linux's; elsewhere the physical memory is the limit and psutil answers.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from adaptrain.resources.cgroup import CGROUP, PROC, MemoryLimit, cgroup_limits
from adaptrain.resources.peak import PeakMemory, proc_status_bytes

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "HostProbe",
    "HostReading",
    "MemoryLimit",
    "PeakMemory",
    "memory_available_bytes",
    "memory_limit_bytes",
    "memory_limits",
    "process_memory_bytes",
]


def process_memory_bytes() -> int:
    """Returns the resident set size of this process, in bytes."""
    return psutil.Process().memory_info().rss


def memory_limits(*, proc: Path = PROC, cgroup: Path = CGROUP) -> list[MemoryLimit]:
    """Reads every ceiling on this process's memory: physical memory, control groups, RLIMIT_AS.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where the control groups are mounted.

    Returns:
        At least the physical memory.
    """
    memory = psutil.virtual_memory()
    limits = [MemoryLimit(source="RAM", limit_bytes=memory.total, available_bytes=memory.available)]
    limits += cgroup_limits(proc=proc, cgroup=cgroup)
    if resource is not None:
        with contextlib.suppress(ValueError, OSError):
            soft, _ = resource.getrlimit(resource.RLIMIT_AS)
            if soft != resource.RLIM_INFINITY:
                # The kernel counts mapped addresses against it, not memory in use.
                mapped = proc_status_bytes("VmSize", proc=proc) or psutil.Process().memory_info().vms
                limits.append(MemoryLimit(source="RLIMIT_AS", limit_bytes=soft, available_bytes=max(0, soft - mapped)))
    return limits


def memory_limit_bytes(*, proc: Path = PROC, cgroup: Path = CGROUP) -> tuple[int, str]:
    """Returns the tightest ceiling on this process's memory in bytes, and what sets it (see `MemoryLimit.source`)."""
    tightest = min(memory_limits(proc=proc, cgroup=cgroup), key=lambda limit: limit.limit_bytes)
    return tightest.limit_bytes, tightest.source


def memory_available_bytes(*, proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Returns the bytes this process may still allocate below every ceiling.

    It is the least over all ceilings, not that of the lowest: a wide limit shared with others can be nearer.
    """
    return min(limit.available_bytes for limit in memory_limits(proc=proc, cgroup=cgroup))


@dataclass(frozen=True, kw_only=True)
class HostReading:
    """What the host probe read.

    Args:
        rss_gib: Resident memory of this process.
        limit_gib: The tightest ceiling on it.
        limit_source: What sets that ceiling.
        available_gib: What this process may still allocate.
        process_cpu_pct: Processor time of this process since the last reading; 100 is one core. None at the first.
        cpu_pct: Use of all cores by everyone since the last reading, 0 to 100. None at the first.
    """

    rss_gib: float
    limit_gib: float
    limit_source: str
    available_gib: float
    process_cpu_pct: float | None = None
    cpu_pct: float | None = None


class HostProbe:
    """Reads the host; keeps the processor times of the last reading to tell the use since.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where the control groups are mounted.
    """

    def __init__(self, *, proc: Path = PROC, cgroup: Path = CGROUP) -> None:
        self._proc = proc
        self._cgroup = cgroup
        self._process = psutil.Process()
        self._last: tuple[float, float, float, float] | None = None

    def read(self) -> HostReading:
        """Returns a reading of now."""
        limits = memory_limits(proc=self._proc, cgroup=self._cgroup)
        tightest = min(limits, key=lambda limit: limit.limit_bytes)
        process_cpu_pct, cpu_pct = self._cpu()
        return HostReading(
            rss_gib=self._process.memory_info().rss / 2**30,
            limit_gib=tightest.limit_bytes / 2**30,
            limit_source=tightest.source,
            available_gib=min(limit.available_bytes for limit in limits) / 2**30,
            process_cpu_pct=process_cpu_pct,
            cpu_pct=cpu_pct,
        )

    def _cpu(self) -> tuple[float | None, float | None]:
        own = self._process.cpu_times()
        everyone = psutil.cpu_times()
        total = sum(everyone) - getattr(everyone, "guest", 0.0) - getattr(everyone, "guest_nice", 0.0)  # in user too
        idle = everyone.idle + getattr(everyone, "iowait", 0.0)
        now = (time.monotonic(), own.user + own.system, total, total - idle)
        last, self._last = self._last, now
        if last is None or now[0] <= last[0]:
            return None, None
        wall_s, own_s, total_s, busy_s = (new - old for new, old in zip(now, last, strict=True))
        # Ticks of 10 ms: a short interval can see no time pass at all.
        busy_pct = min(100.0, max(0.0, 100.0 * busy_s / total_s)) if total_s > 0 else None
        return 100.0 * own_s / wall_s, busy_pct
