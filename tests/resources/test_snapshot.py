"""The snapshot: plain, complete, and free of side effects."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import torch

from adaptrain.resources import DeviceReading, ResourceProbe, ResourceSnapshot, snapshot
from adaptrain.resources.cuda import read_cuda


def test_snapshot_of_this_machine_is_plain() -> None:
    sample = snapshot()
    assert json.loads(json.dumps(sample.to_dict())) == sample.to_dict()
    assert pickle.loads(pickle.dumps(sample)) == sample
    assert sample.limit_gib >= sample.available_gib > 0
    assert sample.rss_gib > 0
    with pytest.raises(AttributeError):
        sample.rss_gib = 0.0  # type: ignore[misc]


def test_metrics_are_the_known_numbers() -> None:
    device = DeviceReading(
        index=1, name="card", allocated_gib=2.0, used_gib=5.0, power_w=300, throttle_reasons=("hw_slowdown",)
    )
    sample = ResourceSnapshot(
        time_s=1.0, rss_gib=1.5, limit_gib=8.0, limit_source="RAM", available_gib=6.0, devices=(device,)
    )
    assert sample.metrics() == {
        "host_rss_gib": 1.5,
        "host_available_gib": 6.0,
        "host_limit_gib": 8.0,
        "gpu1_allocated_gib": 2.0,
        "gpu1_used_gib": 5.0,
        "gpu1_power_w": 300.0,
        "gpu1_throttled": 1.0,
    }
    assert sample.to_dict()["devices"][0]["throttle_reasons"] == ["hw_slowdown"]


def test_an_idle_gpu_is_not_throttled() -> None:
    device = DeviceReading(index=0, used_gib=1.0, throttle_reasons=("gpu_idle",))
    sample = ResourceSnapshot(
        time_s=1.0, rss_gib=1.0, limit_gib=8.0, limit_source="RAM", available_gib=6.0, devices=(device,)
    )
    assert sample.metrics()["gpu0_throttled"] == 0.0


def test_reading_neither_imports_torch_nor_initialises_cuda() -> None:
    script = """
import sys
from adaptrain.resources import snapshot
snapshot()
assert "torch" not in sys.modules
import torch
snapshot()
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the case without a device")
def test_no_cuda_reads_nothing() -> None:
    assert read_cuda() == ()


@pytest.mark.gpu
def test_cuda_counts_this_process_s_tensors() -> None:
    tensor = torch.ones(256, 2**20, device="cuda")  # 1 GiB
    probe = ResourceProbe()
    sample = probe.read()
    probe.close()
    device = next(device for device in sample.devices if device.index == tensor.device.index)
    assert device.allocated_gib is not None
    assert device.reserved_gib is not None
    assert device.allocated_gib >= 1.0
    assert device.reserved_gib >= device.allocated_gib
    assert device.used_gib is not None
    assert device.used_gib >= 1.0
    assert device.uuid is not None
