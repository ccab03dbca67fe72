"""What a device is called, to tell whether something was measured on this one."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from adaptrain.errors import ConfigurationError


def cpu_model() -> str:
    """Returns the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Returns what latency depends on: the GPU, or the processor and the threads that compute on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{cpu_model()}, {threads} thread{'' if threads == 1 else 's'}"
    return f"{device.type} of {platform.node()}"


def read_device(device: str | torch.device) -> torch.device:
    """Returns a device that is there.

    Raises:
        ConfigurationError: Its name says nothing, or there is no such device.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found).item()  # torch names devices that are not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigurationError(
            f"The device {str(device)!r} cannot be used: {reason}. Give cpu, cuda, cuda:1, ..."
        ) from error
    return found
