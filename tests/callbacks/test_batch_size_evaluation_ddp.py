"""Evaluation on two real gloo processes, memory running out on one of them: it replays alone, nobody hangs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from adaptrain import BatchSizeController
from adaptrain.callbacks.base import decision_log
from tests.processes import rank_results
from tests.toys import TextModule, join_ranks, quiet_trainer, text_loader, text_samples, tiny_bert


class Synced(TextModule):
    """Reduces over the ranks at each step and epoch; runs out of memory above `most` samples, after it has logged."""

    def __init__(self, *, most: int | None = None) -> None:
        super().__init__(tiny_bert().double())
        self.most, self.errors = most, 0
        # DistributedDataParallel sends it from rank 0 before each of its forwards, in evaluation too.
        self.register_buffer("shift", torch.zeros(()))

    def validation_step(self, batch, batch_idx):
        logits = self.model(batch["input_ids"], batch["attention_mask"]).logits + self.shift
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        self.log("first", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("second", logits.max(), on_step=True, on_epoch=True, sync_dist=True, reduce_fx="max")
        if self.most is not None and len(logits) > self.most:
            self.errors += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits

    test_step = validation_step

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self.shift += self.global_rank + 1


def worker(rank: int, folder: str, port: int) -> None:
    join_ranks(rank, port)
    results = []
    for most in (None, 2):
        module = Synced(most=most if rank == 1 else None)
        trainer = quiet_trainer(
            Path(folder),
            strategy="ddp",
            devices=2,
            callbacks=[BatchSizeController(micro_batch_size=8)],
            max_epochs=2,
            use_distributed_sampler=False,
            num_sanity_val_steps=1,
        )
        data = text_samples(32, variable=False)[rank::2]
        trainer.fit(module, text_loader(data, batch_size=8), text_loader(data, batch_size=8))
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        [tested] = trainer.test(module, text_loader(data, batch_size=8), verbose=False)
        stages = [decision.readings["stage"] for decision in decision_log(trainer)]
        results.append({"errors": module.errors, "values": values | tested, "stages": stages})
    torch.save(results, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict]]:
    return rank_results("tests.callbacks.test_batch_size_evaluation_ddp", tmp_path_factory.mktemp("ddp"))


def test_a_rank_replays_alone_and_the_reduced_values_are_those_without_an_error(ranks: list[list[dict]]) -> None:
    for rank, (clean, scarce) in enumerate(ranks):
        assert clean["errors"] == 0
        assert scarce["errors"] == (4 if rank else 0)  # 8, then 4 at once, in validation and in test
        assert {"first_epoch", "second_epoch"} <= set(scarce["values"])
        assert scarce["values"] == pytest.approx(clean["values"], rel=1e-6)
        expected = ["validation"] * 2 + ["test"] * 2
        assert scarce["stages"] == (expected if rank else [])
    assert ranks[0][1]["values"]["first_epoch"] == ranks[1][1]["values"]["first_epoch"]


if __name__ == "__main__":
    mp.start_processes(worker, args=(sys.argv[1], int(sys.argv[2])), nprocs=2, start_method="fork")
