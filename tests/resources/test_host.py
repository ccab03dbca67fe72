"""The host probe: limits laid out as files of every kind of control group, and the real ones of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from adaptrain.resources import host
from adaptrain.resources.cgroup import cgroup_limits

GIB = 2**30
V1_UNLIMITED = "9223372036854771712"


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def procfs(tmp_path: Path, cgroup: str) -> Path:
    return lay(tmp_path / "proc", {"self/cgroup": cgroup})


def test_version_2_counts_usage_without_the_cache_the_kernel_can_drop(tmp_path: Path) -> None:
    proc = procfs(tmp_path, "0::/app")
    cgroup = lay(
        tmp_path / "cgroup",
        {
            "app/memory.max": str(4 * GIB),
            "app/memory.current": str(3 * GIB),
            "app/memory.stat": f"anon {2 * GIB}\nfile {GIB}\ninactive_file {GIB}",
        },
    )
    (limit,) = cgroup_limits(proc=proc, cgroup=cgroup)
    assert (limit.source, limit.limit_bytes, limit.available_bytes) == ("cgroup v2", 4 * GIB, 2 * GIB)


def test_version_2_parents_bind_their_children(tmp_path: Path) -> None:
    proc = procfs(tmp_path, "0::/pod/container/job")
    cgroup = lay(
        tmp_path / "cgroup",
        {
            "pod/memory.max": str(2 * GIB),
            "pod/memory.current": str(GIB),
            "pod/container/memory.max": "max",
            "pod/container/job/memory.max": str(3 * GIB),
            "pod/container/job/memory.current": str(GIB // 2),
        },
    )
    limits = cgroup_limits(proc=proc, cgroup=cgroup)
    assert [limit.limit_bytes for limit in limits] == [3 * GIB, 2 * GIB]
    assert min(limit.available_bytes for limit in limits) == GIB


def test_a_wide_limit_shared_with_others_can_be_the_nearest(tmp_path: Path) -> None:
    proc = procfs(tmp_path, "0::/pod/job")
    mib = 2**20
    cgroup = lay(
        tmp_path / "cgroup",
        {
            "pod/memory.max": str(200 * mib),
            "pod/memory.current": str(195 * mib),
            "pod/job/memory.max": str(100 * mib),
            "pod/job/memory.current": str(10 * mib),
        },
    )
    assert host.memory_limit_bytes(proc=proc, cgroup=cgroup) == (100 * mib, "cgroup v2")
    assert host.memory_available_bytes(proc=proc, cgroup=cgroup) == 5 * mib


def test_version_1_nested_with_the_huge_number_as_no_limit(tmp_path: Path) -> None:
    proc = procfs(tmp_path, "9:name=systemd:/\n4:memory,hugetlb:/slice/unit\n1:cpu:/\n0::/")
    cgroup = lay(
        tmp_path / "cgroup",
        {
            "memory/memory.limit_in_bytes": V1_UNLIMITED,
            "memory/slice/memory.limit_in_bytes": str(GIB),
            "memory/slice/memory.usage_in_bytes": str(GIB // 2),
            "memory/slice/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 4}",
            "memory/slice/unit/memory.limit_in_bytes": V1_UNLIMITED,
        },
    )
    (limit,) = cgroup_limits(proc=proc, cgroup=cgroup)
    assert (limit.source, limit.limit_bytes, limit.available_bytes) == ("cgroup v1", GIB, 3 * GIB // 4)


def test_a_container_without_a_namespace_reads_the_root_of_its_mount(tmp_path: Path) -> None:
    proc = procfs(tmp_path, "4:memory:/docker/3f2a")
    cgroup = lay(tmp_path / "cgroup", {"memory/memory.limit_in_bytes": str(GIB)})
    (limit,) = cgroup_limits(proc=proc, cgroup=cgroup)
    assert (limit.limit_bytes, limit.available_bytes) == (GIB, GIB)


def test_hybrid_mount_reads_version_2_below_unified(tmp_path: Path) -> None:
    proc = procfs(tmp_path, "0::/job")
    cgroup = lay(tmp_path / "cgroup", {"unified/job/memory.max": str(GIB), "unified/job/memory.current": "0"})
    assert [limit.limit_bytes for limit in cgroup_limits(proc=proc, cgroup=cgroup)] == [GIB]


def test_a_path_outside_of_the_namespace_does_not_leave_the_mount(tmp_path: Path) -> None:
    proc = procfs(tmp_path, "0::/../../other")
    cgroup = lay(tmp_path / "a" / "b" / "cgroup", {"memory.max": str(2 * GIB)})
    lay(tmp_path / "a", {"other/memory.max": "1"})
    assert [limit.limit_bytes for limit in cgroup_limits(proc=proc, cgroup=cgroup)] == [2 * GIB]


def test_usage_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    proc = procfs(tmp_path, "0::/")
    cgroup = lay(tmp_path / "cgroup", {"memory.max": str(GIB), "memory.current": str(2 * GIB)})
    assert cgroup_limits(proc=proc, cgroup=cgroup)[0].available_bytes == 0


def test_without_procfs_and_cgroups_the_physical_memory_is_the_limit(tmp_path: Path) -> None:
    limits = host.memory_limits(proc=tmp_path, cgroup=tmp_path)
    assert (limits[0].source, limits[0].limit_bytes) == ("RAM", psutil.virtual_memory().total)
    assert not [limit for limit in limits if limit.source.startswith("cgroup")]


def test_this_machine() -> None:
    limit, source = host.memory_limit_bytes()
    assert 0 < limit <= psutil.virtual_memory().total
    assert source in {"RAM", "cgroup v1", "cgroup v2", "RLIMIT_AS"}
    assert 0 <= host.memory_available_bytes() <= limit
    assert 0 < host.process_memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux")
def test_address_space_limit_counts_mapped_addresses_and_is_where_allocation_fails() -> None:
    script = """
import mmap, resource
from adaptrain.resources import host
limit = 2 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert host.memory_limit_bytes() == (limit, "RLIMIT_AS"), host.memory_limit_bytes()
available = host.memory_available_bytes()
kept = mmap.mmap(-1, available - 2**24)  # mapped, never touched: no memory in use, yet it counts
assert host.memory_available_bytes() < 2**25
try:
    mmap.mmap(-1, 2**26)
except OSError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("refused\n", "", 0)


def test_imports_and_reads_without_the_resource_module() -> None:
    script = """
import sys
import psutil  # on Linux it needs the module itself
sys.modules["resource"] = None  # as on Windows
from adaptrain.resources import host
print(host.memory_limit_bytes()[0] > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_processor_use_is_that_since_the_last_reading() -> None:
    probe = host.HostProbe()
    first = probe.read()
    assert first.process_cpu_pct is None
    assert first.cpu_pct is None
    before = psutil.Process().cpu_times()
    while psutil.Process().cpu_times().user - before.user < 0.05:
        sum(range(10_000))
    second = probe.read()
    assert second.process_cpu_pct is not None
    assert second.process_cpu_pct > 0
    assert second.cpu_pct is None or 0 <= second.cpu_pct <= 100
    assert second.rss_gib > 0
