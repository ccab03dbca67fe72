"""A container's memory limit, whose only warning is the kill: prediction alone keeps the training step below it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from adaptrain import BatchSizeController
from adaptrain.callbacks.base import decision_log
from tests.memory import (
    BATCH,
    MIB,
    LongSequences,
    MemoryGroup,
    Taker,
    TakesFor,
    keep_no_free_heap,
    long_batches,
    memory_group,
)
from tests.toys import quiet_trainer, weights

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's"),
]


@dataclass(frozen=True)
class Run:
    """Training that is to stay within `room_mib` more than what is in use when it begins.

    The whole batch takes about 1.8 MiB a column. With `taken_mib`, another process takes that much for the steps from
    6 to 14.
    """

    lengths: list[int]
    room_mib: int
    micro_batch_size: Any
    taken_mib: int = 0
    validated: int = 0


class Validated(LongSequences):
    """Logs the loss of validation; `validation_ran` keeps the samples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.validation_ran: list[int] = []

    def validation_step(self, batch, batch_idx):
        self.validation_ran.append(len(batch["input_ids"]))
        self.log("val/loss", self.loss(batch))


RUNS = {
    "whole": Run([128] * 16, 130, "auto"),  # 230 MiB unsplit
    "late": Run([8, 16, 12, 16, 8, 16, 12, 16, 256, 16, 256], 160, BATCH),  # 460 MiB in the first of 256 columns
    "taken": Run([32] * 40, 140, BATCH, taken_mib=100),  # 60 MiB unsplit
    "validated": Run([16, 24, 32, 24], 100, BATCH, validated=512),  # 60 MiB; 64 MiB for each activation in validation
}


class Limit(pl.Callback):
    def __init__(self, group: MemoryGroup, room_mib: int) -> None:
        self.group, self.room_mib = group, room_mib

    def on_fit_start(self, trainer, pl_module) -> None:
        self.group.limit(self.group.usage_bytes() + self.room_mib * MIB)


def train(run: Run, folder: Path, callbacks: list[Any]) -> tuple[LongSequences, Any]:
    torch.manual_seed(0)
    loaders = [torch.utils.data.DataLoader(long_batches(run.lengths), batch_size=None)]  # type: ignore[arg-type]
    if run.validated:
        loaders.append(torch.utils.data.DataLoader(long_batches([run.validated]), batch_size=None))  # type: ignore[arg-type]
    module = Validated() if run.validated else LongSequences()
    # Before any training nothing is known of what a step takes.
    trainer = quiet_trainer(folder, callbacks=callbacks, num_sanity_val_steps=0)
    trainer.fit(module, *loaders)
    return module, trainer


def within(group: MemoryGroup, name: str, controlled: bool, folder: Path) -> None:
    """Trains in the group; leaves its results in `folder`, if it lives to."""
    run = RUNS[name]
    group.join()
    callbacks: list[Any] = [Limit(group, run.room_mib)]
    if run.taken_mib:
        keep_no_free_heap()  # else the other process could not even take it
        callbacks.append(TakesFor(Taker.of_host(run.taken_mib * MIB), first=6, last=14))
    Path("/proc/self/oom_score_adj").write_text("1000")  # when memory runs out, this process is the one to go
    if controlled:
        callbacks.append(BatchSizeController(micro_batch_size=run.micro_batch_size))
    module, trainer = train(run, folder, callbacks)
    decisions = [(d.old, d.new, d.reason) for d in decision_log(trainer)] if controlled else []
    results = {"weights": weights(module), "ran": module.ran, "decisions": decisions}
    if isinstance(module, Validated):
        results |= {"validation": module.validation_ran, "loss": trainer.callback_metrics["val/loss"]}
    torch.save(results, folder / f"{name}.pt")


def main(folder: Path) -> None:
    """Forks a process for every run, so that all begin alike; each that is not killed ends with 0."""
    torch.set_num_threads(1)
    ends = {}
    for name in RUNS:
        for controlled in (False, True):
            with memory_group() as group:
                child = os.fork()
                if not child:
                    within(group, name, controlled, folder)
                    os._exit(0)
                ends[f"{name} {controlled}"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (folder / "ends.json").write_text(json.dumps(ends))


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], Path]:
    try:
        with memory_group():
            pass
    except OSError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cgroup")
    command = [sys.executable, "-m", "tests.callbacks.test_batch_size_cgroup", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    (folder / "stderr").write_bytes(done.stderr)
    return json.loads((folder / "ends.json").read_text()), folder


@pytest.mark.parametrize("name", RUNS)
def test_plain_lightning_is_killed_and_ours_ends_with_the_weights_of_an_unlimited_run(
    name: str, ends: tuple[dict[str, int], Path], tmp_path: Path
) -> None:
    codes, folder = ends
    assert codes[f"{name} False"] == -signal.SIGKILL
    assert codes[f"{name} True"] == 0, (folder / "stderr").read_text()[-4000:]
    ours = torch.load(folder / f"{name}.pt")
    unlimited, _ = train(RUNS[name], tmp_path, [])
    torch.testing.assert_close(ours["weights"], weights(unlimited), rtol=1e-5, atol=1e-7)
    assert not any("ran out" in reason for _, _, reason in ours["decisions"])


def test_a_long_batch_that_comes_late_runs_smaller(ends: tuple[dict[str, int], Path]) -> None:
    results = torch.load(ends[1] / "late.pt")
    assert [max(sizes) for sizes in results["ran"][:8]] == [BATCH] * 8
    assert max(results["ran"][8]) < BATCH
    old, new, reason = results["decisions"][0]
    assert (old, new) == (BATCH, max(results["ran"][8]))
    assert "A batch as long as this one" in reason


def test_validation_of_a_longer_batch_runs_in_pieces(ends: tuple[dict[str, int], Path], tmp_path: Path) -> None:
    results = torch.load(ends[1] / "validated.pt")
    assert max(results["validation"]) < BATCH
    assert sum(results["validation"]) == BATCH
    assert any("as training has shown" in reason for _, _, reason in results["decisions"])
    _, trainer = train(RUNS["validated"], tmp_path, [])
    torch.testing.assert_close(results["loss"], trainer.callback_metrics["val/loss"], rtol=1e-5, atol=0)


def test_it_gives_way_to_another_process_and_grows_back(ends: tuple[dict[str, int], Path]) -> None:
    results = torch.load(ends[1] / "taken.pt")
    largest = [max(sizes) for sizes in results["ran"]]
    assert largest[:6] == [BATCH] * 6
    assert max(largest[6:14]) < BATCH
    assert largest[16:] == [BATCH] * 24
    taken, back = results["decisions"]
    assert taken[:2] == (BATCH, largest[6])
    assert "Memory was taken" in taken[2]
    assert back[1] == BATCH
    assert "Memory is back" in back[2]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
