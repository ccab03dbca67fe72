"""The NVML probe: no driver, the real one where there is a GPU, and mapping and decoding on a small stand-in library.

The stand-in exists because a driver's answers (MIG, other processes, errors) cannot be had without its hardware.
"""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaptrain.resources.nvml import NvmlProbe, throttle_reasons, visible_devices

GIB = 2**30


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class Library:
    """Two GPUs; the second is cut into two MIG instances."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    nvmlMemory_v2 = 2

    def __init__(self) -> None:
        self.running: list[tuple[int, int | None]] = []
        self.fail: set[str] = set()
        self.open = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "fail"):

            def failing(*_: Any) -> Any:
                raise NVMLError(f"{name} is lost")

            return failing
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ["GPU-aaaa-1111", "GPU-bbbb-2222"][index]

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:
        return handle.encode()

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"card {handle}"

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        if handle != "GPU-bbbb-2222":
            raise NVMLError_NotSupported
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, slot: int) -> str:
        if slot not in (1, 4):
            raise NVMLError("not found")
        return f"MIG-{slot}"

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return "GPU-bbbb-2222"

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> Any:
        reserve = 0 if version == 2 else GIB
        return SimpleNamespace(total=80 * GIB, used=10 * GIB + reserve, free=70 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.running]

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle.startswith("MIG"):
            raise NVMLError_NotSupported
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if handle.startswith("MIG"):
            raise NVMLError_NotSupported
        return 312_500

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 64

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return 0x4 | 0x40


@pytest.fixture
def library() -> Library:
    return Library()


def probe(library: Library, visible: str | None = None) -> NvmlProbe:
    return NvmlProbe(library=library, environ={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the case without a driver")
def test_silent_and_empty_without_a_driver(caplog: pytest.LogCaptureFixture) -> None:
    nvml = NvmlProbe()
    assert nvml.read() == ()
    assert not nvml.available
    nvml.close()
    assert not caplog.records


@pytest.mark.gpu
def test_real_driver_agrees_with_torch() -> None:
    tensor = torch.ones(256, 2**20, device="cuda")
    index = tensor.device.index
    nvml = NvmlProbe()
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    (reading,) = nvml.read(uuids={index: uuid}, own_bytes={index: torch.cuda.memory_reserved(index)})
    nvml.close()
    _, total = torch.cuda.mem_get_info(index)
    assert reading.total_gib == pytest.approx(total / GIB, rel=0.05)
    assert reading.used_gib is not None
    assert reading.others_gib is not None
    assert 1.0 <= reading.used_gib <= reading.total_gib  # type: ignore[operator]
    assert reading.others_gib <= reading.used_gib - 1.0
    assert nvml.read() == ()


def test_a_reading_in_full(library: Library) -> None:
    library.running = [(os.getpid(), 3 * GIB), (1, 7 * GIB)]
    (reading,) = probe(library).read(uuids={0: "aaaa-1111"})
    assert reading.uuid == "GPU-aaaa-1111"
    assert (reading.used_gib, reading.others_gib, reading.total_gib) == (10, 7, 80)
    assert (reading.utilization_pct, reading.power_w, reading.temperature_c) == (87, 312.5, 64)
    assert reading.throttle_reasons == ("sw_power_cap", "hw_thermal_slowdown")


@pytest.mark.parametrize("running", [[], [(1, 7 * GIB)], [(os.getpid(), None)]])
def test_own_memory_falls_back_to_what_torch_holds(library: Library, running: list[Any]) -> None:
    library.running = running
    (reading,) = probe(library).read(uuids={0: "aaaa-1111"}, own_bytes={0: 4 * GIB})
    assert reading.others_gib == 6


def test_torch_devices_are_found_by_uuid_whatever_their_order(library: Library) -> None:
    readings = probe(library).read(uuids={0: "bbbb-2222", 1: "GPU-aaaa-1111"})
    assert [reading.uuid for reading in readings] == ["GPU-bbbb-2222", "GPU-aaaa-1111"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["GPU-aaaa-1111", "GPU-bbbb-2222"]),
        ("", []),
        ("1", ["GPU-bbbb-2222"]),
        ("1, 0", ["GPU-bbbb-2222", "GPU-aaaa-1111"]),
        ("GPU-bbbb", ["GPU-bbbb-2222"]),
        ("GPU-", []),  # ambiguous
        ("0,-1,1", ["GPU-aaaa-1111"]),
        ("0,9,1", ["GPU-aaaa-1111"]),
        ("MIG-4", ["MIG-4"]),
    ],
)
def test_visible_devices_are_followed_where_torch_has_not_told(
    library: Library, visible: str | None, expected: list[str]
) -> None:
    readings = probe(library, visible).read()
    assert [reading.uuid for reading in readings] == expected
    assert [reading.index for reading in readings] == list(range(len(expected)))


@pytest.mark.parametrize("uuid", ["bbbb-2222", "MIG-4", "4"])
def test_a_mig_instance_is_its_own_memory_and_its_gpu_s_power(library: Library, uuid: str) -> None:
    """Depending on the CUDA version torch tells the instance's UUID or its GPU's."""
    (reading,) = probe(library, "MIG-4").read(uuids={0: uuid})
    assert reading.uuid == "MIG-4"
    assert reading.used_gib == 10
    assert reading.utilization_pct is None
    assert reading.power_w == 312.5


def test_old_driver_without_the_second_memory_query_and_the_new_reasons(library: Library) -> None:
    def first_only(handle: str, version: int | None = None) -> Any:
        if version is not None:
            raise NVMLError("function not found")
        return SimpleNamespace(total=80 * GIB, used=11 * GIB, free=69 * GIB)

    library.nvmlDeviceGetMemoryInfo = first_only  # type: ignore[method-assign]
    library.fail = {"nvmlDeviceGetCurrentClocksEventReasons"}
    library.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x1  # type: ignore[attr-defined]
    (reading,) = probe(library).read(uuids={0: "aaaa-1111"})
    assert reading.used_gib == 11
    assert reading.throttle_reasons == ("gpu_idle",)


def test_an_error_in_mid_run_gives_missing_readings_and_one_warning(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = probe(library)
    assert nvml.read(uuids={0: "aaaa-1111"})[0].power_w == 312.5
    library.fail = {"nvmlDeviceGetPowerUsage"}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            (reading,) = nvml.read(uuids={0: "aaaa-1111"})
            assert reading.power_w is None
            assert reading.used_gib == 10
    assert [record.getMessage() for record in caplog.records] == [
        "NVML's nvmlDeviceGetPowerUsage failed and its readings are missing from now on:"
        " nvmlDeviceGetPowerUsage is lost"
    ]


def test_a_lost_driver_gives_nothing_and_does_not_raise(library: Library) -> None:
    nvml = probe(library)
    assert nvml.available
    library.fail = {name for name in dir(Library) if name.startswith("nvmlDevice")}
    assert nvml.read(uuids={0: "aaaa-1111"}) == ()


def test_a_reading_that_a_device_does_not_support_is_missing_without_a_warning(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(handle: str) -> int:
        raise NVMLError_NotSupported("no power meter")

    library.nvmlDeviceGetPowerUsage = unsupported  # type: ignore[method-assign]
    assert probe(library).read(uuids={0: "aaaa-1111"})[0].power_w is None
    assert not caplog.records


def test_close_shuts_down_once_and_ends_reading(library: Library) -> None:
    nvml = probe(library)
    assert nvml.read()
    assert library.open == 1
    nvml.close()
    nvml.close()
    assert library.open == 0
    assert nvml.read() == ()
    assert library.open == 0


def test_throttle_bits_have_names_and_unknown_ones_keep_their_number() -> None:
    assert throttle_reasons(0) == ()
    assert throttle_reasons(0x8 | 0x200) == ("hw_slowdown", "unknown_0x200")


def test_reason_names_match_the_library() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert throttle_reasons(pynvml.nvmlClocksThrottleReasonSwThermalSlowdown) == ("sw_thermal_slowdown",)
    assert throttle_reasons(pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown) == ("hw_power_brake_slowdown",)
    assert throttle_reasons(pynvml.nvmlClocksThrottleReasonGpuIdle) == ("gpu_idle",)


def test_visible_devices_not_set_is_not_the_same_as_empty() -> None:
    assert visible_devices({}) is None
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == []
