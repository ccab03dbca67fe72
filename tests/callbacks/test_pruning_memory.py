"""Pruning where there is no memory for a dense model beside the one that trains: a real limit on the address space."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from adaptrain import (
    AdaptiveCallback,
    ConfigurationError,
    CubicSchedule,
    Distillation,
    FamilyCheckpoint,
    ModelFamily,
    ProgressivePruning,
    Quantization,
    WeightPruning,
)
from adaptrain.callbacks.base import decision_log
from adaptrain.execution.oom import attempt
from adaptrain.pruning import cost
from adaptrain.pruning.family import Match
from tests.memory import room
from tests.toys import TextModule, quiet_trainer, text_loader, tiny_bert

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")

MIB = 2**20
WEIGHTS = 96 * MIB  # of the model that trains, nearly all of them FFN neurons


class Wide(TextModule):
    def __init__(self, size: int = WEIGHTS) -> None:
        super().__init__(tiny_bert(hidden=256, ffn=size // (2 * 2 * 256 * 4)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Fills(pl.Callback):
    """Something else takes the memory at the end of some steps, and gives it back before the next one.

    Args:
        left: Bytes that it leaves.
        steps: After which steps.
    """

    def __init__(self, left: int, *steps: int) -> None:
        self.left, self.steps = left, steps
        self.taken = contextlib.ExitStack()

    def on_train_batch_start(self, *_: Any) -> None:
        self.taken.close()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.taken.enter_context(room(self.left))


def trained(tmp_path: Any, callback: AdaptiveCallback, fills: Fills, *others: Any, size: int = WEIGHTS) -> pl.Trainer:
    trainer = quiet_trainer(tmp_path, callbacks=[fills, callback, *others], max_epochs=1)
    with fills.taken:
        trainer.fit(Wide(size), text_loader())
    return trainer


SCHEDULE = CubicSchedule(begin=0.2, end=0.6, events=2)  # its events come after 2 and 4 of 6 steps


def test_what_is_computed_needs_no_model_beside_and_the_report_does_without(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(Match, "dense_twin", lambda match: pytest.fail("built"))
    callback = ProgressivePruning(target={"params": 0.5}, schedule=SCHEDULE)
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, callback, Fills(WEIGHTS, 6))
    report = callback.report()
    assert report["constraints"][0]["met"]
    assert 0.45 < report["final"]["params"] / report["dense"]["params"] <= 0.5
    assert (report["dense"]["latency_ms"], report["final"]["latency_ms"]) == (None, None)
    assert report["dense"]["size_bytes"] > WEIGHTS > report["final"]["size_bytes"]
    assert report["dense"]["flops"] > report["final"]["flops"]
    assert "no memory to measure the final model's latency (it takes 0." in caplog.text


def test_zeros_are_reported_without_a_latency(tmp_path, caplog) -> None:
    callback = WeightPruning(sparsity=0.5, schedule=SCHEDULE)
    with caplog.at_level(logging.INFO):
        trained(tmp_path, callback, Fills(WEIGHTS, 6), size=WEIGHTS // 3)  # which is measured in four times as much
    report = callback.report()
    assert report["latency"] is None
    assert report["zeros"] == pytest.approx(0.5, abs=0.01)
    assert "a forward pass takes a time that there was no memory to measure" in caplog.text


class Cramped(FamilyCheckpoint):
    """Something else takes the memory while members are measured."""

    def _measure(self, trainer: Any, store: Any) -> None:
        with room(WEIGHTS // 6):
            super()._measure(trainer, store)


def test_a_family_without_memory_to_be_measured_side_by_side_is_measured_when_that_is_asked(tmp_path, caplog) -> None:
    pruning = ProgressivePruning(target={"params": 0.5}, schedule=SCHEDULE)
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, pruning, Fills(0), Cramped(latency_input=(1, 4)), size=WEIGHTS // 3)
    assert "no memory to measure the members of the family side by side (it takes 0.0" in caplog.text
    family = ModelFamily.load(tmp_path)
    assert [member.name for member in family] == ["dense", "pruned-1", "final"]
    assert not any(member.costs for member in family)
    assert all(found["latency_ms"] > 0 for found in family.measure().values())


class CrampedValidation(FamilyCheckpoint):
    """Something else takes the memory before members are validated, or while it is the turn of the last one.

    Args:
        before: Bytes that are free before.
        last: Bytes that are free for the last one; None: as many as there are.
    """

    def __init__(self, before: int, last: int | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.before, self.last = before, last

    def _judge(self, trainer: Any, pl_module: Any, store: Any) -> None:
        with room(self.before):
            super()._judge(trainer, pl_module, store)

    def _become(self, pl_module: Any, store: Any, member: Any) -> None:
        cramped = self.last is not None and member["name"] == "final"
        with room(self.last or 0) if cramped else contextlib.nullcontext():
            super()._become(pl_module, store, member)


class Validated(Wide):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch).loss)


@pytest.mark.parametrize(
    ("before", "last", "validated", "lack"),
    [
        pytest.param(WEIGHTS // 3, None, 0, r"it takes 0\.\d+ GiB", id="not begun"),
        # Too little to map the last one's file.
        pytest.param(8 * WEIGHTS, WEIGHTS // 24, 2, r"[^)]*allocate", id="in the middle"),
    ],
)
def test_members_that_there_is_no_memory_to_validate_are_not_lost(
    before: int, last: int | None, validated: int, lack: str, tmp_path, caplog
) -> None:
    pruning = ProgressivePruning(target={"params": 0.5}, schedule=SCHEDULE)
    family = CrampedValidation(before, last, latency_input=(1, 4), monitor="val/loss", validation_samples=0)
    trainer, module = quiet_trainer(tmp_path, callbacks=[pruning, family], max_epochs=1), Validated(WEIGHTS // 3)
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, text_loader(), text_loader())
    assert re.search(rf"no memory to validate all members of the family \({lack}.*fit again", caplog.text)
    found = ModelFamily.load(tmp_path)
    assert [member.name for member in found] == ["dense", "pruned-1", "final"]
    assert sum(member.metric is not None for member in found) == validated
    final = found["final"].model().state_dict()
    assert all(torch.equal(value, final[name]) for name, value in module.model.state_dict().items())


def test_without_memory_for_lower_precision_the_run_ends_without(tmp_path, caplog) -> None:
    lowers = Quantization(method="bf16", latency_input=(1, 4))
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, lowers, Fills(WEIGHTS // 4, 6), size=WEIGHTS // 3)
    assert "no memory to hold and measure the model in lower precision (it takes 0.0" in caplog.text
    assert lowers.report() == []
    assert not (tmp_path / "quantized").exists()


def test_memory_that_runs_out_while_lower_precision_is_measured_leaves_none(tmp_path, caplog, monkeypatch) -> None:
    measure = cost.measure_latency

    def cramped(*args: Any, **kwargs: Any) -> Any:
        with room(WEIGHTS // 12):
            return measure(*args, **kwargs)

    monkeypatch.setattr(cost, "measure_latency", cramped)
    lowers = Quantization(method="bf16", latency_input=(1, 4))
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, lowers, Fills(0))  # its matrices take more than 32 MiB: malloc never has room for them
    assert "no memory to hold and measure the model in lower precision (" in caplog.text
    assert "it takes" not in caplog.text  # it was tried
    assert lowers.report() == []
    assert not (tmp_path / "quantized").exists()


def test_latency_that_cannot_be_measured_is_refused_before_training(tmp_path) -> None:
    trainer, module = quiet_trainer(tmp_path, callbacks=[pruning_by_latency()], max_epochs=1), Wide()
    with room(WEIGHTS // 2), pytest.raises(ConfigurationError, match=r"no memory to measure latency.*Limit params"):
        trainer.fit(module, text_loader())


def test_where_memory_is_gone_at_the_last_event_the_table_decides(tmp_path, caplog) -> None:
    callback = pruning_by_latency()
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, callback, Fills(WEIGHTS, 4, 6))
    first, last = [each for each in decision_log(trainer) if each.knob == "structure"]
    assert not last.readings["latency_measured"]
    assert last.readings["latency"] <= 0.5 < first.readings["latency"]
    assert "what goes is decided by the cost table" in caplog.text
    assert "Whether the limit is met is told by the cost table." in caplog.text
    (entry,) = callback.report()["constraints"]
    assert entry["met"]
    assert entry["value"] == last.readings["latency"]


def test_without_memory_for_a_teacher_training_goes_on_without(tmp_path, caplog) -> None:
    teacher = Distillation()
    fills = Fills(3 * WEIGHTS // 4, 2)
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, ProgressivePruning(target={"params": 0.5}, schedule=SCHEDULE), fills, teacher)
    decisions = decision_log(trainer)
    assert [each.step for each in decisions if each.knob == "structure"] == [2, 4]
    (told,) = [each for each in decisions if each.knob == "distillation"]  # it does not take a pruned one later
    assert told.step == 2
    assert told.reason.startswith("No memory for a copy of the dense model (it takes 0.")
    assert "goes on without" in caplog.text
    assert "did nothing" not in caplog.text
    assert teacher.state_dict() == {"began": False, "gave_up": True}


def pruning_by_latency() -> ProgressivePruning:
    return ProgressivePruning(target={"latency": 0.5}, schedule=SCHEDULE, latency_input=(1, 4))


def test_what_surely_finds_no_memory_is_not_tried() -> None:
    with room(64 * MIB):
        assert attempt(lambda: "done", host_bytes=MIB) == ("done", None)
        found, lack = attempt(lambda: pytest.fail("tried"), host_bytes=2**40)
    assert found is None
    assert lack is not None
    assert lack.startswith("it takes 1024.00 GiB, and 0.")
