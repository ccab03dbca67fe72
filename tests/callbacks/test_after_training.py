"""Validation after training keeps to the memory that training kept to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptrain import BatchSizeController, FamilyCheckpoint, ModelFamily, Quantization, WeightSoup
from adaptrain.callbacks.base import decision_log
from tests.family.conftest import pruning
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, tiny_bert


class Scarce(TextModule):
    """Validation runs out of memory above some samples at once."""

    def __init__(self, most: int) -> None:
        super().__init__(tiny_bert(dropout=0.0))
        self.most = most

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rows = len(batch["labels"])
        if rows > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.log("val/loss", self.model(**batch).loss, batch_size=rows)


def fit(folder: Path, most: int, *callbacks: Any) -> Any:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, callbacks=list(callbacks), max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(Scarce(most), text_loader(), text_loader(text_samples(24, seed=4), batch_size=12))
    return trainer


AFTER = {
    "soup": lambda: [WeightSoup(method="uniform_soup", begin=0.0)],
    "quantized": lambda: [Quantization(method="bf16")],
    "family": lambda: [pruning(), FamilyCheckpoint(recovery_steps=2)],
}


@pytest.mark.parametrize("name", AFTER)
def test_batches_that_did_not_fit_in_training_run_in_pieces_after_it(name: str, tmp_path: Path) -> None:
    trainer = fit(tmp_path, 5, BatchSizeController(micro_batch_size=8), *AFTER[name]())
    assert trainer.callback_metrics["val/loss"] > 0
    knobs = {"soup": "weights", "quantized": "precision", "family": "recovery"}
    (decision, *_) = [each for each in decision_log(trainer) if each.knob == knobs[name]]
    assert "val/loss" in decision.reason
    lines = (tmp_path / "after_training" / "decisions.jsonl").read_text().splitlines()
    assert {json.loads(line)["knob"] for line in lines} == {"micro_batch_size"}


def test_members_are_ranked_as_where_there_is_memory(tmp_path: Path) -> None:
    found = []
    for most in (12, 5):
        controller = BatchSizeController(micro_batch_size=8)
        fit(tmp_path / str(most), most, controller, pruning(), FamilyCheckpoint())
        found.append([member.metric for member in ModelFamily.load(tmp_path / str(most))])
    assert len(found[0]) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert not (tmp_path / "12" / "after_training").exists()
