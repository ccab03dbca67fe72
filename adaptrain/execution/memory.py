"""The memory a step runs in, on the host or on a CUDA device: what is used, its peak, and what it may reach."""

from __future__ import annotations

import platform
from typing import Any

import torch

from adaptrain.resources import host
from adaptrain.resources.heap import release_free_heap

GIB = 2**30
_RESOLUTION_BYTES = 2**20  # resident memory is counted in pages, by each thread for a while: less is noise


class StepMemory:
    """Measures memory where the model runs.

    On a CUDA device: what torch's allocator holds in tensors, against what the device has free for this process, its
    allocator's cache included, and the share that `torch.cuda.set_per_process_memory_fraction` leaves it (where this
    torch tells it). A cache in pieces too small for a tensor counts as free; the error that follows is one to recover
    from. On the host: resident memory, against the tightest of physical memory, control groups and RLIMIT_AS.
    Elsewhere the host is measured too.

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
            share = _cuda_share(self.device) * total  # what torch's allocator may hold; others do not count there
            limit = min(reachable - (1 - self._fraction) * total, self._fraction * share)
        else:
            used = host.process_memory_bytes()
            limit = min(used + self._room_bytes(ceiling) for ceiling in host.memory_limits())
        return limit if self._limit_gib is None else min(limit, self._limit_gib * GIB)

    def _room_bytes(self, ceiling: host.MemoryLimit) -> float:
        if ceiling.source == "RLIMIT_AS":
            # It counts addresses, gigabytes of which are mapped and never used: the share is of what is left.
            return self._fraction * ceiling.available_bytes
        return ceiling.available_bytes - (1 - self._fraction) * ceiling.limit_bytes

    @property
    def can_kill(self) -> bool:
        """Whether running out may end the process, as a container does, and not raise an error to recover from."""
        return not self._is_cuda

    def release(self) -> None:
        """Gives back what is free and still counts as used, which is cheap enough to do between two steps."""
        if not self._is_cuda:
            release_free_heap()

    def start(self) -> None:
        """Begins to measure a step; on the host, without what it takes from free blocks of the heap: see `release`."""
        self.floor_bytes = self.used_bytes()
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._host_peak = host.PeakMemory()
            self._host_peak.reset()

    def stop(self) -> int:
        """Ends it, when the device has finished, and returns the peak in bytes; `added_bytes` has what is new in it."""
        if self._is_cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        assert self._host_peak is not None
        self._host_peak.close()
        return self._host_peak.read()

    def added_bytes(self, peak: int) -> float:
        """Returns what a step with this peak took, beside what was in use when `start` was called."""
        return float(max(0 if self._is_cuda else _RESOLUTION_BYTES, peak - self.floor_bytes))

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


def _cuda_share(device: torch.device) -> float:
    read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if read is None else float(read(device))
