"""The CUDA probe: what this process holds on its devices, as torch's allocator counts it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CudaReading:
    """Memory of one CUDA device.

    Args:
        index: torch's index of the device.
        name: The device's name.
        uuid: Its UUID without a prefix, or None where this torch does not tell.
        allocated_gib: Held by tensors of this process.
        peak_allocated_gib: The most held by tensors since torch's peak was last reset.
        reserved_gib: Held by this process's allocator, tensors and cache.
        free_gib: Free on the device, for any process.
        total_gib: Size of the device.
    """

    index: int
    name: str
    uuid: str | None
    allocated_gib: float
    peak_allocated_gib: float
    reserved_gib: float
    free_gib: float
    total_gib: float


def read_cuda() -> tuple[CudaReading, ...]:
    """Reads every CUDA device this process has used.

    Reading must not cost the memory of a CUDA context: nothing is read before the program itself has initialised
    CUDA, and no device on which its allocator holds nothing.

    Returns:
        One reading per device in use; empty without CUDA.
    """
    torch: Any = sys.modules.get("torch")  # not imported yet means that CUDA is not initialised either
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ()
    readings = []
    for index in range(torch.cuda.device_count()):
        reserved = torch.cuda.memory_reserved(index)
        if reserved == 0:
            continue
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        uuid = getattr(properties, "uuid", None)
        readings.append(
            CudaReading(
                index=index,
                name=properties.name,
                uuid=None if uuid is None else str(uuid),
                allocated_gib=torch.cuda.memory_allocated(index) / 2**30,
                peak_allocated_gib=torch.cuda.max_memory_allocated(index) / 2**30,
                reserved_gib=reserved / 2**30,
                free_gib=free / 2**30,
                total_gib=total / 2**30,
            )
        )
    return tuple(readings)
