"""Memory limits of control groups, version 1 and 2, read from the files the kernel offers.

Source: kernel documentation, admin-guide/cgroup-v2 (`memory.max`, `memory.current`, `memory.stat`) and
admin-guide/cgroup-v1/memory (`memory.limit_in_bytes`, `memory.usage_in_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")

# Version 1 writes "no limit" as the largest multiple of the page size; pages differ, so anything near it counts.
_UNLIMITED = 1 << 60


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """One ceiling on the memory of this process.

    Args:
        source: What sets it: `"cgroup v2"`, `"cgroup v1"`, `"RLIMIT_AS"` or `"RAM"`.
        limit_bytes: The ceiling.
        available_bytes: What may still be allocated below it, never negative.
    """

    source: str
    limit_bytes: int
    available_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Files:
    source: str
    limit: str
    usage: str
    reclaimable: str  # the key in memory.stat of page cache that the kernel drops before it kills


_V2 = _Files(source="cgroup v2", limit="memory.max", usage="memory.current", reclaimable="inactive_file")
_V1 = _Files(
    source="cgroup v1",
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    reclaimable="total_inactive_file",
)


def cgroup_limits(*, proc: Path = PROC, cgroup: Path = CGROUP) -> list[MemoryLimit]:
    """Reads the limit of every control group this process is in, from its own up to the root.

    A group's limit binds all groups below it, so each level that has one is listed. A container without a cgroup
    namespace sees a path that does not exist below its mount; the mount's root is then its own group.

    Args:
        proc: Where procfs is mounted.
        cgroup: Where the control groups are mounted.

    Returns:
        The limits found; empty where there is no control group or none limits memory.
    """
    groups = _groups(_read(f"{proc}/self/cgroup"), str(cgroup))
    return [limit for folder, files in groups if (limit := _level(folder, files)) is not None]


@lru_cache(maxsize=8)  # read before steps of a few milliseconds; where this process is hardly ever changes
def _groups(text: str, cgroup: str) -> tuple[tuple[str, _Files], ...]:
    """The folders of the groups that `text`, a process's `cgroup` file, names, and of those above them."""
    groups: list[tuple[str, _Files]] = []
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            # Version 2 alone is mounted at the root; beside version 1 it is in `unified`.
            for mount in (cgroup, f"{cgroup}/unified"):
                groups += [(folder, _V2) for folder in _walk(mount, path)]
        elif "memory" in controllers.split(","):
            groups += [(folder, _V1) for folder in _walk(f"{cgroup}/memory", path)]
    return tuple(groups)


def _walk(mount: str, path: str) -> list[str]:
    parts = PurePosixPath(path).parts[1:]
    if ".." in parts:  # the process was moved outside of its cgroup namespace; only the root can be read
        parts = ()
    return ["/".join((mount, *parts[:depth])) for depth in range(len(parts), -1, -1)]


def _level(folder: str, files: _Files) -> MemoryLimit | None:
    text = _read(f"{folder}/{files.limit}").strip()
    if not text.isdigit() or int(text) >= _UNLIMITED:  # missing, "max", or version 1's huge number
        return None
    limit = int(text)
    usage = _read(f"{folder}/{files.usage}").strip()
    stat = dict(line.split(maxsplit=1) for line in _read(f"{folder}/memory.stat").splitlines() if " " in line)
    used = (int(usage) if usage.isdigit() else 0) - int(stat.get(files.reclaimable, 0))
    return MemoryLimit(source=files.source, limit_bytes=limit, available_bytes=max(0, min(limit, limit - max(0, used))))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
