"""ResourceMonitor: what it logs and keeps, and that neither its thread nor its failures outlive or hurt a fit."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger as OtherDummyLogger
from pytorch_lightning.loggers.logger import DummyLogger

import adaptrain.callbacks.monitor as monitor_module
from adaptrain import ConfigurationError, ResourceMonitor
from tests.toys import TextModule, quiet_trainer, text_loader, weights


class Records:
    """Keeps what is logged, and says which thread logged it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("adaptrain/") for name in metrics):
            assert threading.current_thread() is threading.main_thread()
            assert step is not None
            self.rows.append((step, dict(metrics)))


class RecordingLogger(Records, DummyLogger):
    pass


class OtherRecordingLogger(Records, OtherDummyLogger):
    pass


class WaitForSample(pl.Callback):
    """Lets the thread take a new sample between two batches, so that each can be logged."""

    def __init__(self, monitor: ResourceMonitor) -> None:
        self.monitor = monitor

    def on_train_batch_start(self, *_: Any) -> None:
        before, until = self.monitor.latest, time.monotonic() + 10
        while self.monitor.latest is before and time.monotonic() < until:
            time.sleep(0.001)


def monitor_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("adaptrain-")]


def test_logs_the_latest_sample_at_the_cadence_of_the_trainer(tmp_path: Path) -> None:
    monitor, logger = ResourceMonitor(interval_s=0.001), RecordingLogger()
    callbacks = [monitor, WaitForSample(monitor)]
    trainer = quiet_trainer(tmp_path, logger=logger, callbacks=callbacks, log_every_n_steps=2)
    trainer.fit(TextModule(), text_loader())
    assert [step for step, _ in logger.rows] == [2, 4, 6]
    for _, metrics in logger.rows:
        assert {"adaptrain/host_rss_gib", "adaptrain/host_available_gib"} <= metrics.keys()
        assert all(name.startswith("adaptrain/") and type(value) is float for name, value in metrics.items())
    assert monitor.peaks()["host_rss_gib"] >= max(metrics["adaptrain/host_rss_gib"] for _, metrics in logger.rows)


def test_steps_count_not_batches_under_accumulation(tmp_path: Path) -> None:
    monitor, logger = ResourceMonitor(interval_s=0.001), RecordingLogger()
    callbacks = [monitor, WaitForSample(monitor)]
    trainer = quiet_trainer(
        tmp_path, logger=logger, callbacks=callbacks, log_every_n_steps=1, accumulate_grad_batches=3
    )
    trainer.fit(TextModule(), text_loader())
    assert {step for step, _ in logger.rows} <= {0, 1, 2}
    assert logger.rows[-1][0] == 2


def test_a_sample_is_logged_once(tmp_path: Path) -> None:
    monitor, logger = ResourceMonitor(interval_s=1000), RecordingLogger()
    callbacks = [monitor, FirstSample(monitor)]
    trainer = quiet_trainer(tmp_path, logger=logger, callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(TextModule(), text_loader())
    assert [step for step, _ in logger.rows] == [1]


class FirstSample(WaitForSample):
    def on_train_batch_start(self, *args: Any) -> None:
        if self.monitor.latest is None:
            super().on_train_batch_start(*args)


def test_serves_the_other_namespace(tmp_path: Path) -> None:
    class Module(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monitor, logger = ResourceMonitor(interval_s=1000), OtherRecordingLogger()
    trainer = quiet_trainer(tmp_path, namespace=lp, logger=logger, callbacks=[monitor], log_every_n_steps=1)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(400, 2)))  # type: ignore[arg-type]
    assert len(logger.rows) <= 1
    assert monitor.peaks()["host_rss_gib"] > 0


def test_needs_no_logger(tmp_path: Path) -> None:
    monitor = ResourceMonitor()
    quiet_trainer(tmp_path, callbacks=[monitor]).fit(TextModule(), text_loader())
    assert monitor.peaks()["host_rss_gib"] > 0


def test_thread_ends_with_the_fit(tmp_path: Path) -> None:
    seen: list[str] = []

    class Look(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            seen.extend(monitor_threads())

    quiet_trainer(tmp_path, callbacks=[ResourceMonitor(), Look()]).fit(TextModule(), text_loader())
    assert seen == ["adaptrain-resource-monitor"]
    assert monitor_threads() == []


def test_thread_ends_with_a_failing_fit(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    monitor = ResourceMonitor()
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(tmp_path, callbacks=[monitor, Fail()]).fit(TextModule(), text_loader())
    assert monitor_threads() == []
    assert monitor.peaks()["host_rss_gib"] > 0


def test_a_failing_probe_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(monitor_module.ResourceProbe):
        reads = 0

        def read(self) -> Any:
            Broken.reads += 1
            raise OSError("no such sensor")

    class Slow(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            time.sleep(0.01)

    monkeypatch.setattr(monitor_module, "ResourceProbe", Broken)
    monitor, logger = ResourceMonitor(interval_s=0.001), RecordingLogger()
    trainer = quiet_trainer(tmp_path, logger=logger, callbacks=[monitor, Slow()], log_every_n_steps=1)
    with caplog.at_level(logging.WARNING, logger="adaptrain"):
        trainer.fit(TextModule(), text_loader())
    assert trainer.global_step == 6
    assert Broken.reads > 1
    assert len([record for record in caplog.records if "no such sensor" in record.getMessage()]) == 1
    assert logger.rows == []
    assert monitor_threads() == []


def test_peaks_outlive_the_fit_and_go_on_on_resume(tmp_path: Path) -> None:
    first = ResourceMonitor()
    trainer = quiet_trainer(tmp_path, callbacks=[first])
    trainer.fit(TextModule(), text_loader())
    path = tmp_path / "end.ckpt"
    first._peaks["host_rss_gib"] = 1000.0  # a peak no later run of this test reaches
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)

    resumed = ResourceMonitor()
    quiet_trainer(tmp_path, callbacks=[resumed], max_epochs=2).fit(TextModule(), text_loader(), ckpt_path=path)
    assert resumed.peaks()["host_rss_gib"] == 1000.0

    quiet_trainer(tmp_path, callbacks=[resumed]).fit(TextModule(), text_loader())
    assert resumed.peaks()["host_rss_gib"] < 1000.0


def test_changes_nothing_in_training(tmp_path: Path) -> None:
    plain, watched = TextModule(), TextModule()
    quiet_trainer(tmp_path).fit(plain, text_loader())
    quiet_trainer(tmp_path, callbacks=[ResourceMonitor(interval_s=0.001)]).fit(watched, text_loader())
    assert torch.equal(weights(plain), weights(watched))


@pytest.mark.parametrize("interval_s", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_refuses_an_interval_that_is_none(interval_s: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"interval_s=.*greater than 0"):
        ResourceMonitor(interval_s=interval_s)


def test_pickles_and_is_told_apart_by_name() -> None:
    copy = pickle.loads(pickle.dumps(ResourceMonitor(interval_s=3, name="fine")))
    assert copy.interval_s == 3
    assert copy.state_key == "ResourceMonitor[fine]" != ResourceMonitor().state_key
