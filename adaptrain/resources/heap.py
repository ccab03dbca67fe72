"""The C library's heap, where it is glibc: what it keeps of memory that is free. Elsewhere nothing is done."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["HeapKeeper", "as_elsewhere", "release_free_heap"]

_M_MMAP_THRESHOLD = -3  # of malloc.h
_USUAL_BYTES = 2**25  # to where glibc's own threshold moves: it follows the blocks that are freed

_mapped_from: int | None = None  # bytes; as the heap, there is one in a process


def release_free_heap() -> None:
    """Gives the heap's free blocks back to the system.

    glibc keeps blocks that the program has freed. Until they are given back they count as resident memory, and what
    is allocated into them does not show there. About 15 ms per 300 MiB; a few microseconds where nothing is free.
    """
    _call("malloc_trim", 0)


class HeapKeeper:
    """Keeps resident memory near what is in use, where tensors of many sizes come and go.

    What they leave free fits little of what comes next, and the heap grows by pages that hold nothing. From the first
    call on it does not grow by large blocks: where none of that size is free, they are mapped, each on its own, and
    their memory goes back when they are freed, for page faults when they are made (mallopt(3), `M_MMAP_THRESHOLD`).
    What smaller ones leave is given back now and then, in a bounded share of the time. A threshold that the user has
    set in the environment stays.

    Call it where as little as possible is in use, such as between two steps.

    Args:
        large_bytes: The size from which on a block is large.
        share: The largest share of the time that giving back may take, in (0, 1).
    """

    def __init__(self, *, large_bytes: int = 2**18, share: float = 1 / 256) -> None:
        self.large_bytes = large_bytes
        self.share = share
        self._due = 0.0
        self._maps = False

    def __call__(self) -> None:
        """Gives back what is free, unless that was done a short while ago."""
        if not self._maps:
            self._maps = True
            _map_from(self.large_bytes)
        began = time.monotonic()
        if began < self._due:
            return
        release_free_heap()
        self._due = began + (time.monotonic() - began) / self.share

    def stop(self) -> None:
        """Lets the heap grow again."""
        if self._maps:
            self._maps = False
            _map_from(None)


@contextlib.contextmanager
def as_elsewhere() -> Iterator[None]:
    """The heap as it is in a program without a `HeapKeeper`: for measuring how fast that would be."""
    mapped_from = _mapped_from
    if mapped_from is None:
        yield
        return
    _map_from(None)
    try:
        yield
    finally:
        _map_from(mapped_from)


def _map_from(size: int | None) -> None:
    global _mapped_from
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    _mapped_from = size
    _call("mallopt", _M_MMAP_THRESHOLD, _USUAL_BYTES if size is None else size)


def _call(function: str, *arguments: Any) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
