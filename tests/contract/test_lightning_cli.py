"""The callbacks in the YAML files and on the command line of Lightning's own `LightningCLI`."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning.cli import LightningCLI

import adaptrain
from adaptrain.callbacks.base import decision_log
from tests.toys import ValidatedTextModule, text_loader, tiny_bert

CALLBACKS = sorted(
    name
    for name in adaptrain.__all__
    if isinstance(found := getattr(adaptrain, name), type) and issubclass(found, pl.Callback)
)
CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 4
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: adaptrain.BatchSizeController
      init_args:
        global_batch_size:
          class_path: adaptrain.BatchSizeRamp
          init_args: {begin: 4, end: 8}
    - class_path: adaptrain.LearningRateController
      init_args: {plateau: false}
    - class_path: adaptrain.ProgressivePruning
      init_args:
        target: {params: 0.8}
        groups: [heads, ffn]
        importance: magnitude
        schedule:
          class_path: adaptrain.CubicSchedule
          init_args: {begin: 0.2, end: 0.6, events: 3}
    - class_path: adaptrain.Distillation
      init_args: {teacher: dense}
    - adaptrain.ResourceMonitor
"""


class Module(ValidatedTextModule):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(tiny_bert(), lr=lr)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return text_loader()

    def val_dataloader(self) -> Any:
        return text_loader()


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    # Lightning's own use of what jsonargparse has deprecated; nothing a user of it can change.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def run(*arguments: str) -> LightningCLI:
    return LightningCLI(Module, Data, args=list(arguments))


def test_a_yaml_file_composes_them(tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG)
    config["trainer"]["default_root_dir"] = str(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    trainer = run("fit", "--config", str(path)).trainer
    pruning = next(c for c in trainer.callbacks if isinstance(c, adaptrain.ProgressivePruning))
    assert pruning.report()["constraints"][0]["met"]
    assert pruning.report()["events"] == 3
    assert {"structure", "global_batch_size"} <= {decision.knob for decision in decision_log(trainer)}
    saved = yaml.safe_load(next(tmp_path.rglob("lightning_logs/*/config.yaml")).read_text())
    assert saved["trainer"]["callbacks"][2]["init_args"]["schedule"]["init_args"]["events"] == 3


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_argument_is_known_to_it(name: str) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(adaptrain, name), "callback")
    printed = parser.format_help()
    for argument in inspect.signature(getattr(adaptrain, name)).parameters:
        assert f"--callback.{argument}" in printed


def test_help_says_what_a_callback_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("fit", "--trainer.callbacks.help=adaptrain.ProgressivePruning")
    assert ended.value.code == 0
    assert "--trainer.callbacks.target" in capsys.readouterr().out


def test_a_wrong_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("fit", "--trainer.callbacks=adaptrain.ProgressivePruning", "--trainer.callbacks.tarket=1")
    assert ended.value.code == 2
    assert "tarket" in capsys.readouterr().err
