from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")

ALLOCATE = """
import ctypes
from adaptrain.resources.heap import as_elsewhere, map_large_blocks
from adaptrain.resources.host import process_memory_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = libc.malloc.argtypes = [ctypes.c_void_p]
def is_mapped(size=2**21):
    block = libc.malloc(size)  # and kept: nothing of its size is free
    return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)  # IS_MMAPPED
"""


def in_a_process_of_its_own(program: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env={**os.environ, **environment})


def test_large_blocks_are_mapped_until_it_ends_and_not_while_speed_is_measured() -> None:
    in_a_process_of_its_own(
        ALLOCATE
        + """
libc.free(libc.malloc(2**24))  # glibc's own threshold follows what is freed
assert not is_mapped(), "mapped from the start: this test sees nothing"
with as_elsewhere():
    assert not is_mapped()
end = map_large_blocks()
assert is_mapped()
assert not is_mapped(2**17), "a small one was mapped"
with as_elsewhere():
    assert not is_mapped()
assert is_mapped()
end()
assert not is_mapped()
map_large_blocks()
assert is_mapped()
"""
    )


@pytest.mark.parametrize(("first", "most"), [("map_large_blocks()", 34), ("pass", 66)])
def test_what_is_freed_between_other_blocks_goes_back(first: str, most: int) -> None:
    in_a_process_of_its_own(
        ALLOCATE
        + f"""
libc.free(libc.malloc(2**24))
{first}
before = process_memory_bytes()
blocks = [libc.malloc(2**20) for _ in range(64)]
for block in blocks:
    ctypes.memset(block, 1, 2**20)
for block in blocks[::2]:
    libc.free(block)
taken = (process_memory_bytes() - before) / 2**20
assert {most} - 4 < taken < {most}, taken
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
end = map_large_blocks()
assert not is_mapped()
assert is_mapped(2**23)
end()
assert is_mapped(2**23)
""",
        **environment,
    )
