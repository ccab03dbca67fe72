from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from adaptrain.app.lock import LOCK_FILE, held
from adaptrain.app.train import run
from adaptrain.decisions import read_decisions
from adaptrain.report import Summary
from tests.app.conftest import Command, only_run
from tests.processes import run_python

ROOT = Path(__file__).parents[2]
SETTINGS = ["budget.params=0.8", "essentials.checkpoint.every_n_train_steps=3"]


@pytest.fixture(scope="module")
def interrupted(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its step 7, with checkpoints of step 6; its settings are `tiny + SETTINGS`."""
    folder = tmp_path_factory.mktemp("interrupted")
    script = folder / "killed.py"
    script.write_text(
        "import os, sys\n"
        "from adaptrain.callbacks.wall_clock import WallClock\n"
        "ends = WallClock.on_train_batch_end\n"
        "def killed(self, trainer, *args):\n"
        "    ends(self, trainer, *args)\n"
        "    if trainer.global_step == 7:\n"
        "        os._exit(9)\n"
        "WallClock.on_train_batch_end = killed\n"
        "from adaptrain.app.train import main\n"
        "main()\n"
    )
    environment = {"XDG_CACHE_HOME": str(folder / "cache")}
    result = run_python(script, *tiny, *SETTINGS, folder=folder, environment=environment)
    assert result.returncode == 9, result.stderr
    return only_run(folder)


@pytest.fixture
def copied(interrupted: Path, workplace: Path) -> Path:
    """A copy of the interrupted run, to resume."""
    return Path(shutil.copytree(interrupted, workplace / "runs" / "train" / "interrupted"))


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    command: Command, tiny: list[str], copied: Path, workplace: Path
) -> None:
    before = _losses(copied)
    result = command("resume=runs/train/interrupted")
    assert result.code == 0, result.err
    assert "from step 6" in result.err
    assert command(*tiny, *SETTINGS, "experiment_name=whole").code == 0
    whole = only_run(workplace, "runs/whole/*")
    assert _losses(copied) == _losses(whole)
    assert _losses(copied)[:6] == before[:6]
    structure = [
        [
            (decision.step, decision.new)
            for decision in read_decisions(folder / "decisions.jsonl")
            if decision.knob == "structure"
        ]
        for folder in (copied, whole)
    ]
    assert structure[0] == structure[1]
    assert structure[0][0][0] < 6  # of before the kill
    weights = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (copied, whole)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert Summary.load(copied).final.metric == Summary.load(whole).final.metric


def test_the_same_settings_may_be_given_again(command: Command, tiny: list[str], copied: Path) -> None:
    result = command(*tiny, *SETTINGS, "resume=runs/train/interrupted", "logger=none")
    assert result.code == 0, result.err
    assert Summary.load(copied).status == "finished"


def test_other_settings_are_refused_with_both_values(command: Command, tiny: list[str], copied: Path) -> None:
    files = sorted(copied.rglob("*"))
    result = command(*tiny, *SETTINGS, "resume=runs/train/interrupted", "model.lr=0.5", "data.batch_size=4")
    assert result.code == 2
    assert "model.lr: 0.001 in the run, 0.5 now" in result.err
    assert "data.batch_size" in result.err
    assert "Traceback" not in result.err
    assert sorted(copied.rglob("*")) == files


def test_one_other_setting_beside_resume_is_refused(command: Command, copied: Path) -> None:
    result = command("resume=runs/train/interrupted", "seed=7")
    assert result.code == 2
    assert "seed: 42 in the run, 7 now" in result.err


def test_a_checkpoint_cut_short_falls_back_to_the_other(command: Command, copied: Path) -> None:
    last = copied / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    result = command("resume=runs/train/interrupted")
    assert result.code == 0, result.err
    assert "last.ckpt cannot be read" in result.err
    assert "step=6.ckpt" in result.err


def test_no_whole_checkpoint_is_refused(command: Command, copied: Path) -> None:
    for path in (copied / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    result = command("resume=runs/train/interrupted")
    assert result.code == 2
    assert "no checkpoint" in result.err
    assert copied.is_dir()


def test_a_finished_run_is_refused(command: Command, copied: Path) -> None:
    (copied / "summary.json").write_text("{}")
    result = command("resume=runs/train/interrupted")
    assert result.code == 2
    assert "finished" in result.err


def test_a_run_that_another_process_goes_on_with_is_left_alone(copied: Path) -> None:
    def contents() -> dict[Path, bytes]:  # a record lock is lost where its process reads the file
        return {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != LOCK_FILE}

    before = contents()
    with held(copied):
        refused = run_python("-m", "adaptrain", f"resume={copied}")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {copied} is in use: process {os.getpid()} on ")
    assert contents() == before


def test_a_run_killed_after_training_is_only_finished(command: Command, copied: Path) -> None:
    assert command("resume=runs/train/interrupted").code == 0
    first = Summary.load(copied)
    (copied / "summary.json").unlink()
    result = command("resume=runs/train/interrupted")
    assert result.code == 0, result.err
    second = Summary.load(copied)
    assert (second.final.params, second.final.metric) == (first.final.params, first.final.metric)
    assert second.decisions == first.decisions


def test_an_unexpected_error_says_how_to_go_on(command: Command, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptrain.app import finish

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(finish, "finish", broken)
    result = command("resume=runs/train/interrupted")
    assert result.code == 1
    assert "Traceback" in result.err
    assert "resume with: python train.py resume=runs/train/interrupted" in result.err
    assert "the disk is gone" in (copied / "train.log").read_text()


def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on(tiny: list[str], tmp_path: Path) -> None:
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, sys\n"
        "from adaptrain.callbacks.wall_clock import WallClock\n"
        "ends = WallClock.on_train_batch_end\n"
        "def limited(self, trainer, *args):\n"
        "    ends(self, trainer, *args)\n"
        "    if trainer.global_step == 7:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "WallClock.on_train_batch_end = limited\n"
        "from adaptrain.app.train import main\n"
        "main()\n"
    )
    result = run_python(script, *tiny, *SETTINGS, "run_dir=mine", folder=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "Logging error" not in result.stderr
    *_, resume, error = result.stderr.splitlines()
    assert error.startswith("error: File too large")
    assert resume.startswith("resume with: ")
    assert resume.endswith(" resume=mine")
    again = run_python("-m", "adaptrain", "resume=mine", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert Summary.load(tmp_path / "mine").status == "finished"


def test_resuming_is_a_function_too(copied: Path) -> None:
    cfg = OmegaConf.load(copied / "config.yaml")
    cfg.resume = str(copied)
    value = run(cfg, overrides=["resume=x"])  # type: ignore[arg-type]
    assert value == Summary.load(copied).final.metric


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_checkpoint_that_resumes(tiny: list[str], tmp_path: Path, signum: signal.Signals) -> None:
    command = [sys.executable, str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    long = [item for item in tiny if not item.startswith("trainer.max_steps")]
    process = subprocess.Popen(
        [*command, *long, "trainer.max_steps=100000", "budget.wall_clock_min=0.3"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("runs/*/*/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signum)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signum
    assert "Traceback" not in err
    folder = only_run(tmp_path)
    log = (folder / "train.log").read_text()
    assert "ended early: TrainingInterrupted" in log
    assert "Traceback" not in log
    assert f"resume with: python train.py resume={folder.relative_to(tmp_path)}" in err
    result = subprocess.run(
        [*command, f"resume={folder.relative_to(tmp_path)}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert Summary.load(folder).status == "wall clock"


def _losses(folder: Path) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
