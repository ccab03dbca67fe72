"""The peak of host memory: the kernel's mark, its sharing, and the sampling where it is refused."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import pytest

from adaptrain.resources import host
from adaptrain.resources.heap import release_free_heap
from adaptrain.resources.peak import PeakMemory, proc_status_bytes
from tests.processes import run_python

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")


def touch(mib: int) -> None:
    """Uses and frees memory that goes back to the system at once, also where the heap had room for it."""
    block = bytearray(mib * MIB)
    block[::4096] = b"\1" * len(block[::4096])
    del block
    settle()


def settle() -> None:
    """Gives back what is free: garbage is not to go in the middle, and what the heap keeps shows no use."""
    gc.collect()
    release_free_heap()


def without_clear_refs(tmp_path: Path) -> Path:
    """A procfs whose mark cannot be reset."""
    (tmp_path / "self" / "clear_refs").mkdir(parents=True)
    (tmp_path / "self" / "status").write_text("VmHWM:\t 1024 kB\n")
    return tmp_path


def sees_a_peak_that_is_gone_and_forgets_it_on_reset(_: Path) -> None:
    settle()
    base = host.process_memory_bytes()
    with PeakMemory() as peak:
        assert peak.source == "VmHWM"
        touch(128)
        assert peak.read() >= base + 100 * MIB
        peak.reset()
        assert peak.read() < base + 100 * MIB


def is_not_disturbed_by_another_that_overlaps(_: Path) -> None:
    settle()
    base = host.process_memory_bytes()
    with PeakMemory() as outer:
        touch(128)
        with PeakMemory() as inner:
            touch(48)
        assert base + 16 * MIB <= inner.read() < base + 100 * MIB
        assert outer.read() >= base + 100 * MIB


def samples_where_the_mark_cannot_be_reset(tmp_path: Path) -> None:
    settle()
    base = host.process_memory_bytes()
    with PeakMemory(interval_s=0.001, proc=without_clear_refs(tmp_path)) as peak:
        assert peak.source == "sampling"
        block = bytearray(b"\1") * (64 * MIB)
        assert peak.read() >= base + 48 * MIB
        del block
    assert peak.read() >= base + 48 * MIB
    assert "adaptrain-peak-memory" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(sees_a_peak_that_is_gone_and_forgets_it_on_reset, marks=linux),
        pytest.param(is_not_disturbed_by_another_that_overlaps, marks=linux),
        samples_where_the_mark_cannot_be_reset,
    ],
)
def test_in_a_process_of_its_own(check, tmp_path: Path) -> None:
    """Not in this one: what earlier tests left may be freed, or reclaimed by the system, while it is measured."""
    result = run_python("-m", __name__, check.__name__, tmp_path)
    assert result.returncode == 0, result.stderr


@linux
def test_result_stays_after_close() -> None:
    with PeakMemory() as peak:
        pass
    result = peak.read()
    touch(128)
    assert peak.read() == result


def test_samples_without_procfs(tmp_path: Path) -> None:
    with PeakMemory(proc=tmp_path) as peak:
        assert peak.source == "sampling"
        assert peak.read() > 0


def test_read_needs_a_reset() -> None:
    with pytest.raises(RuntimeError, match="reset"):
        PeakMemory().read()


@linux
def test_status_sizes_are_bytes(tmp_path: Path) -> None:
    resident = proc_status_bytes("VmRSS")
    assert resident is not None
    assert resident == pytest.approx(host.process_memory_bytes(), rel=0.2)
    assert proc_status_bytes("VmNone") is None
    assert proc_status_bytes("VmRSS", proc=tmp_path) is None


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
