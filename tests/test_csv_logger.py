from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch

from adaptrain import _lightning
from adaptrain._lightning.csv_logger import RunCSVLogger, drop_rows_from, read_rows
from tests.toys import TextModule, quiet_trainer, text_loader


def test_a_metric_that_appears_later_is_a_new_column(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path / "run")
    logger.log_metrics({"loss": 2.0}, step=0)
    logger.log_metrics({"accuracy": torch.tensor(0.5)}, step=1)
    assert read_rows(tmp_path / "run" / "metrics.csv") == [
        {"accuracy": "", "loss": "2.0", "step": "0"},
        {"accuracy": "0.5", "loss": "", "step": "1"},
    ]


def test_every_row_is_on_disk_at_once_and_a_second_logger_appends(tmp_path: Path) -> None:
    RunCSVLogger(tmp_path).log_metrics({"loss": 2.0}, step=0)
    RunCSVLogger(tmp_path).log_metrics({"loss": 1.0}, step=1)
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.csv")] == ["2.0", "1.0"]


def test_nothing_is_made_before_the_first_metric(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path / "run")
    assert logger.save_dir == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_steps_taken_again_and_a_torn_last_row_are_dropped(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path)
    for step in range(4):
        logger.log_metrics({"loss": float(step), "z": 1.0}, step=step)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "1.0,")
    drop_rows_from(path, 2)
    assert [row["step"] for row in read_rows(path)] == ["0", "1"]


def test_no_file_has_nothing_to_drop(tmp_path: Path) -> None:
    drop_rows_from(tmp_path / "metrics.csv", 2)
    assert not (tmp_path / "metrics.csv").exists()


def test_it_serves_the_trainer(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, logger=RunCSVLogger(tmp_path / "run"), log_every_n_steps=1)
    trainer.fit(TextModule(), text_loader())
    assert _lightning.run_folder(trainer) == tmp_path / "run"
    assert sum(bool(row["train/loss_step"]) for row in read_rows(tmp_path / "run" / "metrics.csv")) == 6


def test_the_step_a_fit_resumes_from_is_known_when_it_starts(tmp_path: Path) -> None:
    """The seam: where Lightning keeps the checkpoint it has opened."""
    seen: list[tuple[int | None, int]] = []

    class Look(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append((_lightning.resume_step(trainer), trainer.global_step))

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append((_lightning.resume_step(trainer), trainer.global_step))

    first = quiet_trainer(tmp_path, callbacks=[Look()])
    first.fit(TextModule(), text_loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = quiet_trainer(tmp_path, callbacks=[Look()], max_epochs=2)
    second.fit(TextModule(), text_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert seen == [(None, 0), (None, 0), (6, 0), (6, 6)]
