from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")

ALLOCATE = """
import ctypes
from adaptrain.resources.heap import HeapKeeper, as_elsewhere
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = libc.malloc.argtypes = [ctypes.c_void_p]
def is_mapped(size=2**21):
    block = libc.malloc(size)  # and kept: nothing of its size is free
    return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)  # IS_MMAPPED
"""


def in_a_process_of_its_own(program: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env={**os.environ, **environment})


def test_free_pages_of_the_heap_are_given_back_in_a_bounded_share_of_the_time() -> None:
    """Blocks of 64 KiB, every other one freed."""
    program = """
import ctypes, time
from adaptrain.resources.heap import HeapKeeper
from adaptrain.resources.host import process_memory_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def spread():
    blocks = [libc.malloc(65536) for _ in range(1600)]
    for block in blocks:
        ctypes.memset(block, 1, 65536)
    for block in blocks[::2]:
        libc.free(block)
    return process_memory_bytes()
keep = HeapKeeper(share=1 / 50)
full = spread()
began = time.monotonic()
keep()
took = time.monotonic() - began
assert full - process_memory_bytes() > 40 * 2**20, "nothing was given back"
again = spread()
keep()
if time.monotonic() - began < 25 * took:
    assert again - process_memory_bytes() < 2**20, "given back at once again"
time.sleep(2 * 50 * took)
keep()
assert again - process_memory_bytes() > 40 * 2**20, "not given back later"
"""
    in_a_process_of_its_own(program)


def test_large_blocks_are_mapped_until_it_stops_and_not_while_speed_is_measured() -> None:
    in_a_process_of_its_own(
        ALLOCATE
        + """
libc.free(libc.malloc(2**24))  # glibc's own threshold follows what is freed
assert not is_mapped(), "mapped from the start: this test sees nothing"
with as_elsewhere():
    assert not is_mapped()
keep = HeapKeeper()
keep()
assert is_mapped()
assert not is_mapped(2**17), "a small one was mapped"
with as_elsewhere():
    assert not is_mapped()
assert is_mapped()
keep.stop()
assert not is_mapped()
keep()
assert is_mapped()
"""
    )


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_MMAP_THRESHOLD_": str(2**23)}, {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**23}"}],
)
def test_a_threshold_that_the_user_has_set_stays(environment: dict[str, str]) -> None:
    in_a_process_of_its_own(
        ALLOCATE
        + """
keep = HeapKeeper()
keep()
assert not is_mapped()
assert is_mapped(2**23)
keep.stop()
assert is_mapped(2**23)
""",
        **environment,
    )
