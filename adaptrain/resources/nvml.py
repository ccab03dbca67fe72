"""The NVML probe: what the driver knows of the GPUs, other processes' memory included.

Silent and empty where there is no driver. Source of the calls and bits: NVIDIA NVML API reference, `nvml.h`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LOG = logging.getLogger(__name__)

# nvmlClocksEventReason*, formerly nvmlClocksThrottleReason*
_THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


@dataclass(frozen=True, kw_only=True)
class NvmlReading:
    """What the driver says of one GPU or MIG instance. None where it does not tell.

    Args:
        index: torch's index of the device.
        name: The device's name.
        uuid: Its UUID with the driver's prefix, `GPU-` or `MIG-`.
        used_gib: Memory held by all processes.
        others_gib: Memory held by processes other than this one. Where the driver does not list this process (in a
            container), its CUDA context of some hundred MiB counts in.
        total_gib: Size of the device.
        utilization_pct: Share of the last sample period in which a kernel ran. Not known for a MIG instance.
        power_w: Power drawn by the GPU.
        temperature_c: Temperature of the GPU.
        throttle_reasons: Why the clocks are lower than they could be, such as `"sw_power_cap"`.
    """

    index: int
    name: str | None = None
    uuid: str | None = None
    used_gib: float | None = None
    others_gib: float | None = None
    total_gib: float | None = None
    utilization_pct: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttle_reasons: tuple[str, ...] = ()


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """Names the bits of NVML's clocks-event reasons; a bit this table does not know keeps its number."""
    return tuple(
        _THROTTLE_REASONS.get(1 << position, f"unknown_{1 << position:#x}")
        for position in range(bits.bit_length())
        if bits >> position & 1
    )


class NvmlProbe:
    """Reads the GPUs that torch sees, through the driver. Never raises: what cannot be read is missing.

    Args:
        library: The `pynvml` module; None imports it on first use.
        environ: Where `CUDA_VISIBLE_DEVICES` is read from.
    """

    def __init__(self, *, library: Any = None, environ: Mapping[str, str] = os.environ) -> None:
        self._nvml = library
        self._environ = environ
        self._state = "new"  # "open", "absent" or "closed" after it
        self._warned: set[str] = set()

    @property
    def available(self) -> bool:
        """Whether a driver answers."""
        if self._state == "new":
            self._state = "open" if self._open() else "absent"
        return self._state == "open"

    def _open(self) -> bool:
        if self._nvml is None:
            try:
                import pynvml
            except ImportError:
                return False
            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
        except (self._nvml.NVMLError, OSError):
            return False
        return True

    def close(self) -> None:
        """Shuts NVML down; the probe reads nothing after it."""
        if self._state == "open":
            self._try("nvmlShutdown")
        self._state = "closed"

    def read(
        self, *, uuids: Mapping[int, str | None] | None = None, own_bytes: Mapping[int, int] | None = None
    ) -> tuple[NvmlReading, ...]:
        """Reads every device.

        Args:
            uuids: UUIDs by torch index, of the devices torch has told of, with or without the driver's prefix. Given
                (not empty), only these are read; otherwise those that `CUDA_VISIBLE_DEVICES` leaves visible.
            own_bytes: By torch index, what this process is known to hold. Used where the driver does not list this
                process, as in a container, whose process ids are not the driver's.

        Returns:
            One reading per device found, by torch index; empty without a driver.
        """
        if not self.available:
            return ()
        readings = []
        for index, handle in self._handles(uuids or {}).items():
            readings.append(self._device(index, handle, (own_bytes or {}).get(index)))
        return tuple(readings)

    def _handles(self, uuids: Mapping[int, str | None]) -> dict[int, Any]:
        visible = visible_devices(self._environ)
        physical = self._physical()
        if visible is None:
            default: Sequence[Any] = [handle for handle, _ in physical.values()]
        else:
            default = []
            for entry in visible:
                handle = self._find(entry, physical)
                if handle is None:  # CUDA ignores what comes after an entry it does not know
                    break
                default.append(handle)
        if not uuids:
            return dict(enumerate(default))
        found = {}
        for index, uuid in uuids.items():
            # torch reports a MIG instance by its own UUID or by its GPU's, depending on the CUDA version; what the
            # user named in the environment is certain.
            named = visible[index] if visible is not None and index < len(visible) else ""
            handle = self._find(named, physical) if named.startswith("MIG-") else None
            if handle is None and uuid is not None:
                handle = self._find(uuid, physical)
            if handle is None and uuid is None and index < len(default):
                handle = default[index]
            if handle is not None:
                found[index] = handle
        return found

    def _physical(self) -> dict[int, tuple[Any, str]]:
        handles = {}
        for index in range(self._try("nvmlDeviceGetCount") or 0):
            handle = self._try("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                handles[index] = (handle, _text(self._try("nvmlDeviceGetUUID", handle)) or "")
        return handles

    def _find(self, entry: str, physical: Mapping[int, tuple[Any, str]]) -> Any:
        """Finds the handle of an entry of `CUDA_VISIBLE_DEVICES` or of a bare UUID; None where there is none."""
        if entry.isdigit():
            return physical.get(int(entry), (None, ""))[0]
        if not entry.startswith(("GPU-", "MIG-")):
            return self._find(f"GPU-{entry}", physical) or self._find(f"MIG-{entry}", physical)
        if entry.startswith("GPU-"):
            matches = [handle for handle, uuid in physical.values() if uuid.startswith(entry)]  # may be shortened
            return matches[0] if len(matches) == 1 else None
        for handle, _ in physical.values():
            for slot in range(self._try("nvmlDeviceGetMaxMigDeviceCount", handle, quiet=True) or 0):
                instance = self._try("nvmlDeviceGetMigDeviceHandleByIndex", handle, slot, quiet=True)
                if instance is not None and (_text(self._try("nvmlDeviceGetUUID", instance)) or "").startswith(entry):
                    return instance
        return None

    def _device(self, index: int, handle: Any, own_bytes: int | None) -> NvmlReading:
        uuid = _text(self._try("nvmlDeviceGetUUID", handle))
        # Power, temperature and clocks belong to the whole GPU, also where torch sees a slice of it.
        is_mig = uuid is not None and uuid.startswith("MIG-")
        gpu = (self._try("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) or handle) if is_mig else handle
        memory = self._memory(handle)
        used = None if memory is None else int(memory.used)
        own = self._listed_bytes(handle)
        own = own_bytes if own is None else own
        utilization = None if is_mig else self._try("nvmlDeviceGetUtilizationRates", handle)
        power_mw = self._try("nvmlDeviceGetPowerUsage", gpu)
        temperature = self._try("nvmlDeviceGetTemperature", gpu, getattr(self._nvml, "NVML_TEMPERATURE_GPU", 0))
        return NvmlReading(
            index=index,
            name=_text(self._try("nvmlDeviceGetName", handle)),
            uuid=uuid,
            used_gib=None if used is None else used / 2**30,
            others_gib=None if used is None else max(0, used - (own or 0)) / 2**30,
            total_gib=None if memory is None else int(memory.total) / 2**30,
            utilization_pct=None if utilization is None else float(utilization.gpu),
            power_w=None if power_mw is None else power_mw / 1000,
            temperature_c=None if temperature is None else float(temperature),
            throttle_reasons=throttle_reasons(self._throttle_bits(gpu)),
        )

    def _memory(self, handle: Any) -> Any:
        # The second version does not count the driver's own reserve as used; old drivers lack it.
        version = getattr(self._nvml, "nvmlMemory_v2", None)
        memory = None
        if version is not None:
            memory = self._try("nvmlDeviceGetMemoryInfo", handle, version, quiet=True)
        return memory if memory is not None else self._try("nvmlDeviceGetMemoryInfo", handle)

    def _listed_bytes(self, handle: Any) -> int | None:
        processes = self._try("nvmlDeviceGetComputeRunningProcesses", handle) or ()
        own = [p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory is not None]
        return sum(own) if own else None

    def _throttle_bits(self, handle: Any) -> int:
        bits = self._try("nvmlDeviceGetCurrentClocksEventReasons", handle, quiet=True)
        if bits is None:  # the name before driver 535
            bits = self._try("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return int(bits or 0)

    def _try(self, name: str, *args: Any, quiet: bool = False) -> Any:
        """Calls a function of NVML; None where it fails, with one warning per function where that is unexpected."""
        function: Callable[..., Any] | None = getattr(self._nvml, name, None)
        if function is None:
            return None
        try:
            return function(*args)
        except Exception as error:  # a reading is never worth a training run
            expected = getattr(self._nvml, "NVMLError_NotSupported", ())
            if not quiet and not (expected and isinstance(error, expected)) and name not in self._warned:
                self._warned.add(name)
                _LOG.warning("NVML's %s failed and its readings are missing from now on: %s", name, error)
            return None


def visible_devices(environ: Mapping[str, str]) -> list[str] | None:
    """Returns the entries of `CUDA_VISIBLE_DEVICES` that CUDA heeds; None where it is not set: all devices.

    Indices are taken in NVML's order, that of the PCI bus; CUDA's own order differs on machines with unlike GPUs
    unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`. A UUID, from torch or in the variable, is always right.
    """
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    entries = []
    for entry in (part.strip() for part in value.split(",")):
        if not entry or entry.startswith("-"):  # CUDA stops at the first entry that is none
            break
        entries.append(entry)
    return entries


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
