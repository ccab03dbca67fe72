"""The peak of host memory between two points of a program."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal
from weakref import WeakSet

import psutil

from adaptrain.resources.cgroup import PROC

_LOCK = threading.RLock()
_ACTIVE: WeakSet[PeakMemory] = WeakSet()


def proc_status_bytes(field: str, *, proc: Path = PROC) -> int | None:
    """Reads a size such as `VmHWM` from `/proc/self/status`, in bytes; None where there is none."""
    try:
        text = (proc / "self" / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


class PeakMemory:
    """Measures the peak resident memory of this process since `reset`.

    The kernel keeps the peak (`VmHWM`) and forgets it on request (`5` written to `/proc/self/clear_refs`; see
    proc(5)): exact, and free between the two. There is one such mark in a process, so a reset first hands the peak
    seen so far to every other active `PeakMemory`: they may be nested and overlap. Where the mark cannot be reset (not
    Linux, or refused in a container) a thread samples the resident memory, which can miss a short peak; `source`
    says which it is.

    Use it as a context, or call `reset`, `read` and `close`.

    Args:
        interval_s: Seconds between two samples where sampling is needed.
        proc: Where procfs is mounted.
    """

    def __init__(self, *, interval_s: float = 0.01, proc: Path = PROC) -> None:
        self._interval_s = interval_s
        self._proc = proc
        self._seen = 0
        self._sampled = 0  # written by the sampling thread alone
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.source: Literal["VmHWM", "sampling"] | None = None

    def reset(self) -> None:
        """Starts anew from the memory in use now."""
        with _LOCK:
            self.close()
            _hand_over(self._proc)
            self._seen = self._sampled = 0
            if _clear(self._proc):
                self.source = "VmHWM"
            else:
                self.source = "sampling"
                self._stop = threading.Event()
                self._thread = threading.Thread(target=self._sample, name="adaptrain-peak-memory", daemon=True)
                self._thread.start()
            _ACTIVE.add(self)

    def read(self) -> int:
        """Returns the peak since `reset` in bytes; after `close`, the peak up to it.

        Raises:
            RuntimeError: `reset` was never called.
        """
        with _LOCK:
            if self.source is None:
                raise RuntimeError("PeakMemory.read() needs a reset() before it.")
            if self in _ACTIVE:
                self._fold()
            return self._seen

    def close(self) -> None:
        """Ends the measurement and keeps its result."""
        with _LOCK:
            if self in _ACTIVE:
                self._fold()
                _ACTIVE.discard(self)
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> PeakMemory:
        self.reset()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fold(self) -> None:
        now = (proc_status_bytes("VmHWM", proc=self._proc) if self.source == "VmHWM" else None) or _rss()
        self._seen = max(self._seen, self._sampled, now)

    def _sample(self) -> None:
        # Takes no lock: `close` waits for this thread while it may hold it.
        while not self._stop.wait(self._interval_s):
            self._sampled = max(self._sampled, _rss())


def _hand_over(proc: Path) -> None:
    for other in list(_ACTIVE):
        if other._proc == proc:
            other._fold()


def _clear(proc: Path) -> bool:
    if proc_status_bytes("VmHWM", proc=proc) is None:
        return False
    try:
        (proc / "self" / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _rss() -> int:
    return psutil.Process().memory_info().rss
