"""Two real processes that leave one family. Also the script that each of them runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from adaptrain import ConfigurationError, FamilyCheckpoint, ModelFamily
from adaptrain.callbacks.base import decision_log
from tests.family.conftest import pruning
from tests.processes import rank_results
from tests.toys import TextModule, join_ranks, quiet_trainer, text_loader, text_samples, weights

pytestmark = pytest.mark.slow

SAMPLES, VALIDATION = text_samples(96), text_samples(32, seed=4)


class SynchronizedModule(TextModule):
    """Its metric is over all ranks."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.model(**batch)
        right = (output.logits.argmax(-1) == batch["labels"]).double().mean()
        self.log("val/accuracy", right, sync_dist=True, on_epoch=True, batch_size=len(batch["labels"]))


def fit(folder: Path, train: Any, val: Any, callback: FamilyCheckpoint, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    callbacks = [callback, pruning(latency_input=(8, 16))]
    trainer = quiet_trainer(folder, callbacks=callbacks, max_epochs=2, **settings)
    module = SynchronizedModule().double()
    trainer.fit(module, train, val)
    return {"weights": weights(module), "knobs": [decision.knob for decision in decision_log(trainer)]}


def worker(rank: int, folder: str, port: int) -> None:
    join_ranks(rank, port)
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    loaders = text_loader(SAMPLES[rank::2]), text_loader(VALIDATION[rank::2])
    found = fit(Path(folder), *loaders, FamilyCheckpoint(latency_input=(8, 16)), **settings)
    try:
        fit(Path(folder) / "refused", *loaders, FamilyCheckpoint(recovery_steps=2), **settings)
    except ConfigurationError as error:
        found["refused"] = str(error)
    torch.save(found, Path(folder) / f"rank{rank}.pt")


def test_two_ranks_leave_one_family_as_one_process_does(tmp_path) -> None:
    first, second = rank_results("tests.callbacks.test_family_ddp", tmp_path)
    assert torch.equal(first["weights"], second["weights"])
    assert first["knobs"] == second["knobs"]
    assert first["knobs"].count("family") == 3
    assert "recovery_steps=...) trains in one process, but there are 2" in first["refused"]

    alone = tmp_path / "alone"
    loaders = text_loader(SAMPLES, batch_size=16), text_loader(VALIDATION, batch_size=16)
    fit(alone, *loaders, FamilyCheckpoint(latency_input=(8, 16)))
    together, expected = ModelFamily.load(tmp_path), ModelFamily.load(alone)
    assert [(each.name, each.step) for each in together] == [(each.name, each.step) for each in expected]
    for ours, theirs in zip(together, expected, strict=True):
        assert torch.allclose(weights(ours.model()), weights(theirs.model()), rtol=1e-6, atol=1e-8)
        assert ours.metrics == pytest.approx(theirs.metrics)
    assert torch.equal(weights(together["final"].model()), first["weights"])


if __name__ == "__main__":
    mp.start_processes(worker, args=(sys.argv[1], int(sys.argv[2])), nprocs=2, start_method="fork")
