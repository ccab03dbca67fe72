"""One plain reading of everything the probes know."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from adaptrain.resources.cuda import CudaReading, read_cuda
from adaptrain.resources.host import HostProbe
from adaptrain.resources.nvml import NvmlProbe, NvmlReading


@dataclass(frozen=True, kw_only=True)
class DeviceReading:
    """One GPU: the allocator's and the driver's view. None where that view is missing.

    Args:
        index: torch's index of the device.
        name: The device's name.
        uuid: Its UUID.
        allocated_gib: Held by tensors of this process.
        peak_allocated_gib: The most held by tensors since torch's peak was last reset.
        reserved_gib: Held by this process's allocator, tensors and cache.
        free_gib: Free for any process.
        total_gib: Size of the device.
        used_gib: Held by all processes.
        others_gib: Held by processes other than this one.
        utilization_pct: Share of the last sample period in which a kernel ran.
        power_w: Power drawn.
        temperature_c: Temperature.
        throttle_reasons: Why the clocks are lower than they could be.
    """

    index: int
    name: str | None = None
    uuid: str | None = None
    allocated_gib: float | None = None
    peak_allocated_gib: float | None = None
    reserved_gib: float | None = None
    free_gib: float | None = None
    total_gib: float | None = None
    used_gib: float | None = None
    others_gib: float | None = None
    utilization_pct: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttle_reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ResourceSnapshot:
    """The resources at one moment, as plain numbers.

    Args:
        time_s: When, in seconds since the epoch.
        rss_gib: Resident memory of this process.
        limit_gib: The tightest ceiling on it.
        limit_source: What sets it: `"cgroup v2"`, `"cgroup v1"`, `"RLIMIT_AS"` or `"RAM"`.
        available_gib: What this process may still allocate on the host.
        process_cpu_pct: Processor time of this process since the last reading; 100 is one core. None at the first.
        cpu_pct: Use of all cores by everyone since the last reading, 0 to 100. None at the first.
        devices: The GPUs in use.
    """

    time_s: float
    rss_gib: float
    limit_gib: float
    limit_source: str
    available_gib: float
    process_cpu_pct: float | None = None
    cpu_pct: float | None = None
    devices: tuple[DeviceReading, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the snapshot as nested dicts and lists of plain Python values."""
        plain = asdict(self)
        plain["devices"] = [
            device | {"throttle_reasons": list(device["throttle_reasons"])} for device in plain["devices"]
        ]
        return plain

    def metrics(self) -> dict[str, float]:
        """Returns the numbers that are known, by flat name: `host_rss_gib`, `gpu0_used_gib`, ...

        `gpu0_throttled` is 1 where anything but idleness holds the clocks down, else 0.
        """
        numbers: dict[str, float] = {}
        for name in ("rss_gib", "available_gib", "limit_gib", "process_cpu_pct", "cpu_pct"):
            if (value := getattr(self, name)) is not None:
                numbers[f"host_{name}"] = float(value)
        for device in self.devices:
            for name, value in asdict(device).items():
                if name != "index" and isinstance(value, (int, float)):
                    numbers[f"gpu{device.index}_{name}"] = float(value)
            if device.used_gib is not None:
                numbers[f"gpu{device.index}_throttled"] = float(bool(set(device.throttle_reasons) - {"gpu_idle"}))
        return numbers


class ResourceProbe:
    """All probes at once; `close` it when done.

    Args:
        nvml: The driver's probe; None makes one.
    """

    def __init__(self, *, nvml: NvmlProbe | None = None) -> None:
        self._host = HostProbe()
        self._nvml = NvmlProbe() if nvml is None else nvml

    def read(self) -> ResourceSnapshot:
        """Returns the resources of now."""
        host = self._host.read()
        cuda = {reading.index: reading for reading in read_cuda()}
        nvml = {
            reading.index: reading
            for reading in self._nvml.read(
                uuids={index: reading.uuid for index, reading in cuda.items()},
                own_bytes={index: round(reading.reserved_gib * 2**30) for index, reading in cuda.items()},
            )
        }
        devices = tuple(_merge(nvml.get(index), cuda.get(index)) for index in sorted(cuda.keys() | nvml.keys()))
        return ResourceSnapshot(time_s=time.time(), devices=devices, **vars(host))

    def close(self) -> None:
        """Lets go of the driver."""
        self._nvml.close()


def snapshot() -> ResourceSnapshot:
    """Reads the resources once. Processor use needs two readings: see `ResourceProbe`."""
    probe = ResourceProbe()
    try:
        return probe.read()
    finally:
        probe.close()


def _merge(nvml: NvmlReading | None, cuda: CudaReading | None) -> DeviceReading:
    known: dict[str, Any] = {}
    for reading in (nvml, cuda):  # the allocator's word wins where both tell
        if reading is not None:
            known |= {name: value for name, value in vars(reading).items() if value is not None}
    return DeviceReading(**known)
