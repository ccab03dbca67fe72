"""One process at a time trains in a run's folder."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from adaptrain.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes, also of other machines, from training in a folder, which is made where it is absent.

    A POSIX record lock on a file in it: the system drops it with the process that took it, however that ends, and
    processes forked from it do not have it (with `flock` those of a loader would hold it for some seconds longer). It
    drops it too where that process opens and closes the file again. Where the system or the file system has no such
    locks, nothing is kept.

    Args:
        folder: The run's folder.

    Raises:
        ConfigurationError: Another process trains in it.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK_FILE
    file = _taken(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go, so that nobody holds a lock on a file that goes
        os.close(file)


def _taken(path: Path) -> int:
    """Returns the open file, locked, with the name of the process in it."""
    assert fcntl is not None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ConfigurationError(
                f"{path.parent} is in use: {holder} trains in it. Wait until it has ended, or stop it."
            ) from None
        except OSError:
            return file  # no locks here
        if _is_still_there(file, path):
            with contextlib.suppress(OSError):  # a full disk; the name is for people
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
            return file
        os.close(file)


def _is_still_there(file: int, path: Path) -> bool:
    """Whether an open file has its name yet: whoever held the lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False
