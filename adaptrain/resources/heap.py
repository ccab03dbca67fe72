"""The heap of the C library, where that is glibc: giving back what is free in it, and what lies outside of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

__all__ = ["HEAP_MOST", "LEAST_OUTSIDE", "blocks_outside_of_heap", "release_free_heap"]

HEAP_MOST = 4 * 2**20 * ctypes.sizeof(ctypes.c_long)
"""The bytes from which a block lies outside of the heap whatever is set: 32 MiB on a 64-bit system."""

LEAST_OUTSIDE = 2**16
"""The bytes from which a block is worth pages of its own: smaller ones would waste a good part of a page."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

_limits: list[int] = []  # of the contexts that are open, the innermost last


def release_free_heap() -> None:
    """Gives the heap's free blocks back to the system, where the C library is glibc; nothing elsewhere.

    glibc keeps blocks that the program has freed. Until they are given back they count as resident memory, and what
    is allocated into them does not show there. About 15 ms per 300 MiB, and 2.5 µs a page when it is used again; a few
    microseconds where nothing is free.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@contextlib.contextmanager
def blocks_outside_of_heap(least: int) -> Iterator[None]:
    """Lets blocks that find no free place in the heap lie outside of it, where they go back when they are freed.

    glibc extends its heap for them, which shrinks from its end alone: one small block there keeps all before it. What
    is free in between counts as resident once it was used. A block outside costs its pages anew each time, so that a
    small `least` takes time. Nothing is done where the C library is another one, or where the environment sets the
    threshold (`MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`). Afterwards the threshold is that of the context around,
    or the largest that glibc comes to by itself.

    Args:
        least: Bytes of a block from which it may lie outside.
    """
    libc = None if _is_set_by_user() else _glibc()
    if libc is None:
        yield
        return
    limit = min(least, HEAP_MOST)
    _limits.append(limit)
    _limit(libc, limit)
    try:
        yield
    finally:
        _limits.remove(limit)
        _limit(libc, _limits[-1] if _limits else HEAP_MOST)


def _limit(libc: ctypes.CDLL, least: int) -> None:
    libc.mallopt(_MMAP_THRESHOLD, least)
    libc.mallopt(_TRIM_THRESHOLD, 2 * HEAP_MOST)  # setting the other one leaves it at 128 KiB


def _is_set_by_user() -> bool:
    return any(name in os.environ for name in _SET_BY_USER) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError):
        libc = ctypes.CDLL("libc.so.6")
        if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt"):
            return libc
    return None
