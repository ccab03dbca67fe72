"""What the tests of real memory limits share: a model that takes much, a control group, a process that takes memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytorch_lightning as pl
import torch
from torch import nn

from adaptrain.execution.oom import release_memory

MIB = 2**20
BATCH, WIDTH = 16, 2048
CGROUP = Path("/sys/fs/cgroup")
# Of a process under RLIMIT_AS: what is freed goes back, and huge pages halve the time that touching memory takes.
LIMITED = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(MIB), "THP_MEM_ALLOC_ENABLE": "1"}


class LongSequences(pl.LightningModule):
    """About 128 KiB of activations per column of the whole batch, of which some 14 live at once.

    `ran` keeps the samples at once of every training step's parts, one list per step.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.rand(10, WIDTH, generator=generator))
        self.scales = nn.ParameterList(torch.rand(WIDTH, generator=generator) for _ in range(6))
        self.ran: list[list[int]] = []

    def on_train_batch_start(self, batch, batch_idx) -> None:
        self.ran.append([])

    def training_step(self, batch, batch_idx):
        self.ran[-1].append(len(batch["input_ids"]))
        return self.loss(batch)

    def loss(self, batch) -> torch.Tensor:
        x = self.embed[batch["input_ids"]]
        for scale in self.scales:
            x = torch.tanh(x * scale)
        return (x.mean(dim=(1, 2)) - 0.1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def long_batches(lengths: Sequence[int], *, samples: int = BATCH) -> list[dict[str, torch.Tensor]]:
    """One batch of full sequences for each length."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(10, (samples, length), generator=generator),
            "attention_mask": torch.ones(samples, length, dtype=torch.long),
        }
        for length in lengths
    ]


@dataclass(frozen=True)
class MemoryGroup:
    """A control group whose memory is limited, of either version."""

    folder: Path

    @property
    def is_v2(self) -> bool:
        return (self.folder / "memory.max").exists()

    def join(self) -> None:
        """Moves this process into it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def usage_bytes(self) -> int:
        return int((self.folder / ("memory.current" if self.is_v2 else "memory.usage_in_bytes")).read_text())

    def limit(self, size_bytes: int) -> None:
        """Sets the limit, without swap to go to."""
        if self.is_v2:
            (self.folder / "memory.max").write_text(str(size_bytes))
            with contextlib.suppress(OSError):  # no swap accounting
                (self.folder / "memory.swap.max").write_text("0")
            return
        (self.folder / "memory.limit_in_bytes").write_text(str(size_bytes))
        with contextlib.suppress(OSError):
            (self.folder / "memory.memsw.limit_in_bytes").write_text(str(size_bytes))

    def lift(self) -> None:
        """Takes the limit away."""
        if self.is_v2:
            (self.folder / "memory.max").write_text("max")
            return
        with contextlib.suppress(OSError):
            (self.folder / "memory.memsw.limit_in_bytes").write_text("-1")
        (self.folder / "memory.limit_in_bytes").write_text("-1")

    def remove(self) -> None:
        for _ in range(100):  # its last process may still be going
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.05)


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Makes a group below this process's own, or below the nearest one up where it can be made and holds.

    Raises:
        OSError: None can be made, or none is enforced.
    """
    reasons = []
    for parent in _own_groups():
        group = MemoryGroup(parent / f"adaptrain-test-{os.getpid()}-{time.monotonic_ns()}")
        try:
            group.folder.mkdir()
        except OSError as error:
            reasons.append(str(error))
            continue
        try:
            group.limit(64 * MIB)
            hungry = [sys.executable, "-c", f"bytearray(b'1') * (128 * {MIB})"]
            if subprocess.run(hungry, preexec_fn=group.join, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL:
                group.lift()
                yield group
                return
            reasons.append(f"{group.folder} does not enforce its limit")
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
        finally:
            group.remove()
    raise OSError("no control group that limits memory can be made here: " + "; ".join(reasons or ["none is mounted"]))


def _own_groups() -> Iterator[Path]:
    """The folders of this process's memory groups, from its own up to the root."""
    if not Path("/proc/self/cgroup").exists():
        return
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            mount = CGROUP
        elif "memory" in controllers.split(","):
            mount = CGROUP / "memory"
        else:
            continue
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount) and folder.is_dir():
                yield folder


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Leaves this process so many bytes of addresses, none of which new threads reserve for heaps of their own."""
    ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX
    release_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def keep_no_free_heap() -> None:
    """From here on a large tensor's memory goes back to the system when it is freed: what is taken is what is used."""
    assert ctypes.CDLL("libc.so.6").mallopt(-3, MIB)  # M_MMAP_THRESHOLD


class Taker:
    """Another process that takes memory when told, and gives it back.

    Args:
        code: Python that binds the name `block` to what it takes.
    """

    # All but a twentieth of the device: less than the tenth that is left free there.
    CUDA = (
        "import torch; free, total = torch.cuda.mem_get_info();"
        " block = torch.empty(free - total // 20, dtype=torch.uint8, device='cuda')"
    )

    @classmethod
    def of_host(cls, size_bytes: int) -> Taker:
        return cls(f"block = bytearray(b'1') * {size_bytes}")

    def __init__(self, code: str) -> None:
        script = "for line in iter(input, 'end'):\n    exec(line)\n    print('done', flush=True)"
        self._code = code
        self._process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def take(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(self._code + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"

    def give_back(self) -> None:
        """Ends the process: all of its memory is free when this returns."""
        self._process.kill()
        self._process.communicate()


class TakesFor(pl.Callback):
    """Lets another process have memory for some of the training steps."""

    def __init__(self, taker: Taker, *, first: int, last: int) -> None:
        self.taker, self.first, self.last = taker, first, last

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.first:
            self.taker.take()
        if batch_idx == self.last:
            self.taker.give_back()

    def teardown(self, trainer, pl_module, stage) -> None:
        self.taker.give_back()
