from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from adaptrain.app.train import run
from adaptrain.report import Summary
from tests.app.conftest import Command, only_run

ROOT = Path(__file__).parents[2]


def test_a_run_leaves_a_complete_folder(command: Command, tiny: list[str], workplace: Path) -> None:
    result = command(*tiny, "budget.params=0.8", "experiment_name=toy")
    assert result.code == 0, result.err
    assert "accuracy (val)" in result.out
    assert "structure" in result.out
    folder = only_run(workplace)
    assert folder.parent.name == "toy"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "overrides.yaml",
        "versions.json",
        "hardware.json",
        "checkpoints",
        "model",
        "decisions.jsonl",
        "metrics.csv",
        "train.log",
        "summary.json",
        "report.html",
    }
    assert {path.name for path in workplace.iterdir()} == {"runs"}  # Hydra adds nothing of its own
    summary = Summary.load(folder)
    assert summary.status == "finished"
    assert summary.dense is not None
    assert summary.final.params <= 0.8 * summary.dense.params
    assert summary.final.train_time_s is not None
    assert summary.final.train_time_s > 0
    assert "data=files" in OmegaConf.load(folder / "overrides.yaml")
    saved = OmegaConf.load(folder / "config.yaml")
    assert OmegaConf.is_interpolation(saved.callbacks.pruning.target, "params")
    assert saved.run_dir is None
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__


def test_a_run_goes_where_run_dir_says_and_over_no_other(command: Command, tiny: list[str], workplace: Path) -> None:
    (workplace / "mine").mkdir()
    short = [*tiny, "callbacks=none", "trainer.max_steps=2", "run_dir=mine"]
    assert command(*short).code == 0
    assert {path.name for path in workplace.iterdir()} == {"mine"}
    before = (workplace / "mine" / "summary.json").read_bytes()
    again = command(*short)
    assert again.code == 2
    assert "run_dir=mine" in again.err
    assert "resume=mine" in again.err
    assert (workplace / "mine" / "summary.json").read_bytes() == before
    sweep = command("-m", *short[:-1], "run_dir=other", "seed=1,2")
    assert sweep.code != 0
    assert "hydra.sweep.dir" in sweep.err


def test_the_last_checkpoint_holds_the_final_weights(command: Command, tiny: list[str], workplace: Path) -> None:
    assert command(*tiny, "budget.params=0.8").code == 0
    folder = only_run(workplace)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    count = sum(value.numel() for name, value in checkpoint["state_dict"].items() if "position_ids" not in name)
    assert count == Summary.load(folder).final.params


def test_a_config_can_be_run_again(command: Command, tiny: list[str], workplace: Path) -> None:
    assert command(*tiny, "callbacks=none", "seed=3").code == 0
    first = only_run(workplace)
    saved = OmegaConf.load(first / "config.yaml")
    assert isinstance(saved, DictConfig)
    saved.experiment_name = "again"
    value = run(saved)
    second = only_run(workplace, "runs/again/*")
    assert _losses(first) == _losses(second)
    assert value == Summary.load(first).final.metric


def test_the_same_seed_gives_the_same_losses(command: Command, tiny: list[str], workplace: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command(*tiny, "callbacks=none", f"seed={seed}", f"experiment_name={name}").code == 0
    losses = {name: _losses(only_run(workplace, f"runs/{name}/*")) for name in "abc"}
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


def test_without_callbacks_it_is_a_plain_run_that_says_so(command: Command, tiny: list[str], workplace: Path) -> None:
    result = command(*tiny, "callbacks=none", "budget.latency=0.5")
    assert result.code == 0
    assert "nothing in callbacks prunes" in result.err
    summary = Summary.load(only_run(workplace))
    assert summary.dense is None
    assert not summary.met
    assert summary.decisions == {}


def test_a_dry_run_leaves_the_weights_of_no_callback(command: Command, tiny: list[str], workplace: Path) -> None:
    dry = [f"callbacks.{name}.dry_run=true" for name in ("pruning", "batch_size", "learning_rate", "monitor")]
    assert command(*tiny, "budget.params=0.8", *dry, "experiment_name=dry").code == 0
    assert command(*tiny, "callbacks=none", "experiment_name=plain").code == 0
    weights = [
        torch.load(only_run(workplace, f"runs/{name}/*") / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("dry", "plain")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert Summary.load(only_run(workplace, "runs/dry/*")).decisions["structure"] > 0


def test_a_finished_plain_run_is_the_dense_column(command: Command, tiny: list[str], workplace: Path) -> None:
    assert command(*tiny, "callbacks=none", "experiment_name=plain").code == 0
    plain = only_run(workplace)
    result = command(*tiny, "budget.params=0.8", "experiment_name=pruned", f"report.baseline={plain}")
    assert result.code == 0, result.err
    summary = Summary.load(only_run(workplace, "runs/pruned/*"))
    assert summary.dense is not None
    assert summary.dense.metric == Summary.load(plain).final.metric
    assert "baseline" in summary.dense_source


@pytest.mark.parametrize("logger", ["none", "csv", "tensorboard"])
def test_loggers(command: Command, tiny: list[str], workplace: Path, logger: str) -> None:
    assert command(*tiny, "callbacks=none", f"logger={logger}").code == 0
    folder = only_run(workplace)
    assert (folder / "metrics.csv").exists() == (logger != "none")
    assert bool(list(folder.rglob("events.out.*"))) == (logger == "tensorboard")
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("debug", ["fdr", "limit", "overfit", "profiler"])
def test_debug(command: Command, tiny: list[str], workplace: Path, debug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where it was imported before there was any handler, Lightning writes to a stream that no test can read.
    monkeypatch.setattr(logging.getLogger("pytorch_lightning"), "propagate", True)
    short = [item for item in tiny if not item.startswith(("trainer.max_steps", "trainer.val_check"))]
    # What belongs to the preset is left to it, but for the longer ones' length.
    limits = ["trainer.max_steps=8"] if debug in ("overfit", "profiler") else []
    result = command(*short, f"+debug={debug}", *limits)
    assert result.code == 0, result.err
    if debug == "profiler":
        assert "Profiler Report" in result.out + result.err


def test_time_that_is_spent_is_the_run_s_status(command: Command, tiny: list[str], workplace: Path) -> None:
    result = command(*tiny, "callbacks=none", "trainer.max_steps=-1", "budget.wall_clock_min=0.02")
    assert result.code == 0, result.err
    assert Summary.load(only_run(workplace)).status == "wall clock"


def test_a_run_that_diverged_says_so(command: Command, tiny: list[str], workplace: Path) -> None:
    result = command(*tiny, "callbacks=[quantization,soup]", "model.lr=1e38")
    assert result.code == 0, result.err
    summary = Summary.load(only_run(workplace))
    assert summary.status == "diverged"
    assert "diverged (its loss is no number)" in " ".join(result.out.split())
    assert "val/loss of the final model is no number. Lower model.lr" in result.err
    assert "diverged" in (only_run(workplace) / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_share_one_run(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "budget.params=0.8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert Summary.load(only_run(tmp_path)).status == "finished"


def _losses(folder: Path) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        losses = [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
    assert losses
    return losses
