"""The memory a step runs in, on the host or on a CUDA device: what is used, its peak, and what it may reach."""

from __future__ import annotations

import platform
from typing import Any

import torch

from adaptrain.resources import host

GIB = 2**30


class StepMemory:
    """Measures memory where the model runs.

    On a CUDA device: what torch's allocator holds in tensors, against what the device has free for this process. On
    the host: resident memory, against the tightest of physical memory, control groups and RLIMIT_AS. Elsewhere the
    host is measured too.

    Args:
        device: Where the model runs.
        limit_gib: A further limit on it; None: only what there is.
        fraction: The share of what there is that may be used, in (0, 1].
    """

    def __init__(self, device: torch.device, *, limit_gib: float | None, fraction: float) -> None:
        self.device = device
        self._limit_gib = limit_gib
        self._fraction = fraction
        self._is_cuda = device.type == "cuda"
        self._host_peak: host.PeakMemory | None = None
        self.floor_bytes = 0

    def used_bytes(self) -> int:
        """Returns what this process uses now."""
        return torch.cuda.memory_allocated(self.device) if self._is_cuda else host.process_memory_bytes()

    def limit_bytes(self) -> float:
        """Returns what this process may use now; others on the machine or device count against it."""
        if self._is_cuda:
            free, total = torch.cuda.mem_get_info(self.device)
            reachable = free + torch.cuda.memory_reserved(self.device)
            limit = reachable - (1 - self._fraction) * total
        else:
            used = host.process_memory_bytes()
            limit = min(used + self._room_bytes(ceiling) for ceiling in host.memory_limits())
        return limit if self._limit_gib is None else min(limit, self._limit_gib * GIB)

    def _room_bytes(self, ceiling: host.MemoryLimit) -> float:
        if ceiling.source == "RLIMIT_AS":
            # It counts addresses, gigabytes of which are mapped and never used: the share is of what is left.
            return self._fraction * ceiling.available_bytes
        return ceiling.available_bytes - (1 - self._fraction) * ceiling.limit_bytes

    def start(self) -> None:
        """Begins to measure a step."""
        self.floor_bytes = self.used_bytes()
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._host_peak = host.PeakMemory()
            self._host_peak.reset()

    def stop(self) -> int:
        """Ends it, when the device has finished, and returns the peak in bytes."""
        if self._is_cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        assert self._host_peak is not None
        self._host_peak.close()
        return self._host_peak.read()

    def report(self) -> str:
        """Returns one sentence for a person about the memory there is."""
        where = torch.cuda.get_device_name(self.device) if self._is_cuda else "the host"
        text = f"In use on {where}: {self.used_bytes() / GIB:.2f} GiB of the {self.limit_bytes() / GIB:.2f} GiB allowed"
        if self._is_cuda:
            return text + "."
        limit, source = host.memory_limit_bytes()
        return f"{text} (the tightest limit there is: {limit / GIB:.2f} GiB, {source})."

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells this machine from another, as far as memory and speed go."""
        if self._is_cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            return {"device": torch.cuda.get_device_name(self.device), "memory_gib": round(total / GIB, 1)}
        return {
            "device": f"{platform.machine()} x{torch.get_num_threads()}",
            "memory_gib": round(host.memory_limit_bytes()[0] / GIB, 1),
        }
