"""What a call takes: other programs on its core are left out, sleeping is not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adaptrain.resources import clock
from adaptrain.resources.clock import timed

CPU = torch.device("cpu")


def spin(seconds: float = 0.01) -> None:
    """Uses the processor for a while of its own time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="no run delay is counted here")
def test_other_programs_on_the_core_do_not_count() -> None:
    """Two that never rest share it with the call, which has a third of it or less."""
    program = """
import os, subprocess, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from adaptrain.resources.clock import timed
from tests.resources.test_clock import CPU, spin
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
try:
    began = time.perf_counter()
    seconds = [timed(spin, CPU)[1] for _ in range(20)]
    wall = time.perf_counter() - began
finally:
    for other in others:
        other.kill()
assert all(each >= 0.01 for each in seconds), seconds
assert sum(seconds) < 0.75 * wall, (sum(seconds), wall)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_sleep_counts_and_what_is_returned_comes_back() -> None:
    result, seconds = timed(lambda: time.sleep(0.1) or "done", CPU)
    assert result == "done"
    assert seconds >= 0.05  # but for what it waited for a core before and after


def test_where_nothing_is_counted_it_is_the_wall_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (None, "", "nothing to read"):
        if text is not None:
            (tmp_path / "schedstat").write_text(text)
        monkeypatch.setattr(clock, "_SCHEDULER", tmp_path / "schedstat")
        began = time.perf_counter()
        _, seconds = timed(spin, CPU)
        assert 0.01 <= seconds <= time.perf_counter() - began


def test_an_error_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 / 0, CPU)
