"""The C library's heap, each in a process of its own: what lies in it decides what goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from adaptrain.resources import heap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")

ALLOCATE = """
import ctypes
from adaptrain.resources.heap import HEAP_MOST, blocks_outside_of_heap, release_free_heap
from adaptrain.resources.host import process_memory_bytes
MIB = 2**20
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.sbrk.argtypes = [ctypes.c_long]

def allocate(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

def stays(size):
    '''Bytes of a block still resident after it was used and freed, with a small one behind it if it is in the heap.'''
    block = allocate(size)
    in_heap = block < libc.sbrk(0)
    while allocate(2**15) < block and in_heap:  # they lie where something is free before it, as long as there is
        pass
    full = process_memory_bytes()
    libc.free(block)
    return size - (full - process_memory_bytes())
"""


def run_alone(program: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-c", ALLOCATE + program], check=True, timeout=120, env={**os.environ, **environment}
    )


def test_free_blocks_in_the_middle_of_the_heap_are_given_back() -> None:
    run_alone("""
blocks = [allocate(65536) for _ in range(1600)]
for block in blocks[::2]:
    libc.free(block)
full = process_memory_bytes()
release_free_heap()
assert full - process_memory_bytes() > 40 * MIB
""")


def test_blocks_that_find_no_free_place_lie_outside_of_the_heap() -> None:
    run_alone("""
with blocks_outside_of_heap(HEAP_MOST):
    assert stays(8 * MIB) > 7 * MIB, "in the heap, held by what is behind it"
with blocks_outside_of_heap(2**18):
    assert stays(16 * MIB) < MIB, "more than is free there"
    assert stays(2**17) < MIB, "free there"
    with blocks_outside_of_heap(HEAP_MOST):
        assert stays(24 * MIB) > 23 * MIB, "within it is the heap again"
    assert stays(28 * MIB) < MIB, "and what holds around it holds again"
assert stays(31 * MIB) > 30 * MIB, "as at first"
""")


def test_a_block_that_finds_a_free_place_lies_in_the_heap() -> None:
    run_alone("""
with blocks_outside_of_heap(HEAP_MOST):
    stays(24 * MIB)
before = process_memory_bytes()
with blocks_outside_of_heap(2**18):
    allocate(20 * MIB)
assert process_memory_bytes() - before < MIB, "its pages were resident before"
""")


def test_an_error_ends_it() -> None:
    run_alone("""
try:
    with blocks_outside_of_heap(2**18):
        raise KeyError
except KeyError:
    pass
assert stays(8 * MIB) > 7 * MIB
""")


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_MMAP_THRESHOLD_": "33554432"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"},
    ],
)
def test_what_the_environment_sets_stays(environment: dict[str, str]) -> None:
    run_alone(
        """
with blocks_outside_of_heap(2**18):
    assert stays(16 * MIB) > 15 * MIB
""",
        **environment,
    )


def test_it_may_be_left_in_any_order() -> None:
    """Not only the innermost first."""
    first, second = heap.blocks_outside_of_heap(2**20), heap.blocks_outside_of_heap(2**18)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert heap._limits == []
