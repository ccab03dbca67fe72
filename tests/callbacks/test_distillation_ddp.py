"""Two real processes that are pruned and taught. Also the script that each of them runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from adaptrain import BatchSizeController, CubicSchedule, Distillation, ProgressivePruning
from adaptrain.callbacks.base import decision_log
from adaptrain.execution import oom
from tests.processes import rank_results
from tests.toys import TextModule, join_ranks, quiet_trainer, text_loader, text_samples, weights

pytestmark = pytest.mark.slow


def fit(folder: Path, loader: Any, others: list[Any], **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    schedule = CubicSchedule(begin=0.3, end=0.7, events=2)
    pruning = ProgressivePruning(target={"flops": 0.5}, schedule=schedule, latency_input=(8, 16))
    distillation = Distillation(hidden=True)
    trainer = quiet_trainer(folder, callbacks=[pruning, distillation, *others], max_epochs=2, **settings)
    module = TextModule().double()
    trainer.fit(module, loader)
    teacher = None if distillation._model is None else weights(distillation._model)
    told = [each.reason for each in decision_log(trainer) if each.knob == "distillation"]
    return {"weights": weights(module), "teacher": teacher, "told": told}


def worker(rank: int, folder: str, port: int) -> None:
    join_ranks(rank, port)
    found = []
    for others in ([], [BatchSizeController(micro_batch_size=3)]):
        loader = text_loader(text_samples(96)[rank::2])
        settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        found.append(fit(Path(folder), loader, others, **settings))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(oom, "memory_available_bytes", lambda: 0)
        found.append(fit(Path(folder), loader, [], **settings))
    torch.save(found, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return rank_results("tests.callbacks.test_distillation_ddp", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("micro_batches", [False, True])
def test_two_ranks_are_taught_alike_and_as_one_process(ranks, tmp_path, micro_batches) -> None:
    first, second = (rank[micro_batches] for rank in ranks)
    assert torch.equal(first["teacher"], second["teacher"])
    assert torch.equal(first["weights"], second["weights"])
    alone = fit(tmp_path, text_loader(text_samples(96), batch_size=16), [])
    assert torch.allclose(first["teacher"], alone["teacher"], rtol=1e-6, atol=1e-9)
    assert torch.allclose(first["weights"], alone["weights"], rtol=1e-6, atol=1e-8)


def test_where_one_rank_has_no_memory_for_the_teacher_none_is_taught(ranks) -> None:
    first, second = (rank[2] for rank in ranks)
    assert first["teacher"] is second["teacher"] is None
    assert torch.equal(first["weights"], second["weights"])
    (told,) = first["told"]
    assert told == "No memory for a copy of the dense model (on another rank): nothing teaches"


if __name__ == "__main__":
    mp.start_processes(worker, args=(sys.argv[1], int(sys.argv[2])), nprocs=2, start_method="fork")
