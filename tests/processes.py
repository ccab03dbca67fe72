"""Processes of a test's own, forked from one that has imported torch and Lightning already.

A fresh interpreter takes several seconds for these. A process from here is as clean: the one it is forked from has
imported and done nothing else. What is about imports, the environment at start or the heap after it takes a fresh one.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_PRELOADED = [
    "tests.conftest",
    "tests.toys",
    "lightning.pytorch",
    "adaptrain.callbacks.pruning",
    "adaptrain.callbacks.batch_size",
]

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(_PRELOADED)


class Python:
    """`python` with these arguments, on its way: `-m module ...`, `-c code ...` or `script ...`.

    Args:
        arguments: As on the command line.
        environment: Variables beside those of this process.
        folder: Where it runs; None: where this process does.
    """

    def __init__(
        self, *arguments: object, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self._arguments = list(map(str, arguments))
        self._outputs = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        names = [output.name for output in self._outputs]
        everything = {**os.environ, **(environment or {})}
        settings = (self._arguments, str(folder or Path.cwd()), everything, names)
        self._process = FORKSERVER.Process(target=_run, args=settings)
        self._process.start()

    def wait(self, *, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Returns how it ended and what it printed.

        Raises:
            subprocess.TimeoutExpired: It took longer, and was killed.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        self._process.close()
        printed = []
        for output in self._outputs:
            printed.append(output.read().decode(errors="replace"))
            output.close()
        if code is None:
            raise subprocess.TimeoutExpired(self._arguments, timeout, *printed)
        return subprocess.CompletedProcess(self._arguments, code, *printed)


def run_python(
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Runs `python` with these arguments and returns how it ended."""
    return Python(*arguments, environment=environment, folder=folder).wait(timeout=timeout)


def run_ranks(module: str, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Runs `python -m module arguments` as the two ranks that torchrun would start."""
    port = free_port()
    ranks = [Python("-m", module, *arguments, environment=as_torchrun(rank, port)) for rank in range(2)]
    return [rank.wait() for rank in ranks]


def rank_results(module: str, folder: Path) -> list[Any]:
    """Runs `python -m module folder port`, which forks two ranks, and loads the `rank<n>.pt` of each."""
    done = run_python("-m", module, folder, free_port())
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def free_port() -> int:
    """Returns a port of this machine that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_torchrun(rank: int, port: int) -> dict[str, str]:
    """Returns the variables by which torchrun tells a process which of two ranks it is."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _run(arguments: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    gc.freeze()  # what the server imported, as in `tests.conftest`
    for number, name in enumerate(outputs, start=1):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    kind = arguments.pop(0) if arguments[0] in ("-m", "-c") else "file"
    sys.argv = ["-c", *arguments[1:]] if kind == "-c" else arguments
    if kind == "-m":
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
