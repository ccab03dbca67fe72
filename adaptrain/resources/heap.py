"""The C library's heap, where it is glibc: what it keeps of memory that is free. Elsewhere nothing is done."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator

__all__ = ["as_elsewhere", "map_large_blocks", "release_free_heap"]

_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE_BYTES = 2**18
_USUAL_BYTES = 2**25  # to where glibc's own threshold moves: it follows the blocks that are freed

_maps = False  # as the heap, there is one in a process


def release_free_heap() -> None:
    """Gives the heap's free blocks back to the system.

    glibc keeps blocks that the program has freed. Until they are given back they count as resident memory, and what
    is allocated into them does not show there. About 15 ms per 300 MiB; a few microseconds where nothing is free.
    """
    _call("malloc_trim", 0)


def map_large_blocks() -> Callable[[], None]:
    """From now on the heap does not grow by blocks of 256 KiB or more: where none is free, each is mapped on its own.

    Where tensors of many sizes come and go, what they leave free fits little of what comes next, and the heap grows by
    pages that hold nothing. The memory of a mapped block goes back when it is freed, for page faults when it is made.
    A threshold that the user has set in the environment stays. Source: mallopt(3), `M_MMAP_THRESHOLD`.

    Returns:
        What ends it.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return lambda: None
    _map(True)
    return lambda: _map(False)


@contextlib.contextmanager
def as_elsewhere() -> Iterator[None]:
    """The heap as it is in a program that maps no more than usual: for measuring how fast that would be."""
    if not _maps:
        yield
        return
    _map(False)
    try:
        yield
    finally:
        _map(True)


def _map(large: bool) -> None:
    global _maps
    _maps = large
    _call("mallopt", _M_MMAP_THRESHOLD, _LARGE_BYTES if large else _USUAL_BYTES)


def _call(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
