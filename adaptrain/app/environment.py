"""What torch and its libraries read from the environment when they are loaded; what the user has set stays."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    """Sets it for a process of the app, before torch is loaded."""
    _share_cores()
    _use_huge_pages()


def _share_cores() -> None:
    """Lets torch's OpenMP threads wait instead of spin.

    On two cores beside one other training process, a forward pass of the quickstart's encoder took 113 ms so and 233 ms
    with libgomp's default; alone 67 ms and 69 ms (medians).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _use_huge_pages() -> None:
    """Lets torch ask for huge pages for tensors on a CPU, where the kernel gives them (Linux, mode `madvise`).

    A tensor that is made anew for every step costs a page fault for each 4 KiB of it that the last one has given back.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
