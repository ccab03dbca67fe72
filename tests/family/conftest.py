"""A short pruned run that leaves a family of three members."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptrain import CubicSchedule, FamilyCheckpoint, ProgressivePruning
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples

STEPS = 24  # the events come after steps 8 and 17
EPOCHS = 4


class RankedModule(TextModule):
    """It logs a loss and an accuracy."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.model(**batch)
        self.log("val/loss", output.loss)
        self.log("val/accuracy", (output.logits.argmax(-1) == batch["labels"]).float().mean())


def pruning(**arguments: Any) -> ProgressivePruning:
    schedule = CubicSchedule(begin=0.3, end=0.7, events=2)
    return ProgressivePruning(**({"target": {"flops": 0.5}, "schedule": schedule} | arguments))


def fit_family(folder: Path, callbacks: list[Any], *, module: Any = None, **settings: Any) -> tuple[Any, Any]:
    """Trains with the callbacks and validates after each epoch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, **({"callbacks": callbacks, "max_epochs": EPOCHS} | settings))
    module = RankedModule() if module is None else module
    trainer.fit(module, text_loader(), text_loader(text_samples(40, seed=4)), ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The run's folder, and its module as training left it."""
    folder = tmp_path_factory.mktemp("run")
    _, module = fit_family(folder, [FamilyCheckpoint(), pruning()])
    return folder, module
