"""Two real gloo processes, memory running out on one of them: both finish, as one process would on the same batches."""

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
from tests.toys import (
    TextModule,
    join_ranks,
    quiet_trainer,
    text_loader,
    text_samples,
    tiny_bert,
    weights,
)


class TokenModule(TextModule):
    """In fp64; a mean over samples, or over the tokens that count. Runs out of memory above `most` samples."""

    def __init__(self, loss: str = "samples", *, most: int | None = None, phase: str = "forward") -> None:
        super().__init__(tiny_bert().double())
        self.kind, self.most, self.phase = loss, most, phase
        self.errors = 0
        self.register_buffer("mean_length", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        rows = len(batch["input_ids"])
        hidden = self.model.bert(batch["input_ids"], batch["attention_mask"])
        pooled = hidden[0] if self.kind == "tokens" else hidden[1]
        logits = self.model.classifier(pooled)
        if self.most is not None and rows > self.most:
            if self.phase == "forward":
                self.fail()
            logits.register_hook(lambda gradient: self.fail())
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def fail(self) -> None:
        self.errors += 1
        raise torch.OutOfMemoryError("CUDA out of memory.")


def samples(kind: str) -> list[dict[str, torch.Tensor]]:
    found = text_samples(32)
    if kind == "tokens":
        for sample in found:
            sample["labels"] = (sample["input_ids"] % 3).masked_fill(sample["attention_mask"] == 0, -100)
    return found


CASES = [("samples", "forward", 2), ("samples", "backward", 1), ("tokens", "backward", 1)]


def worker(rank: int, folder: str, port: int) -> None:
    """One rank, through all cases: starting processes costs more than training them."""
    join_ranks(rank, port)
    results = []
    for kind, phase, accumulate in CASES:
        module = TokenModule(kind, most=2 if rank == 1 else None, phase=phase)
        controller = BatchSizeController(micro_batch_size=8)
        trainer = quiet_trainer(
            Path(folder),
            strategy="ddp",
            devices=2,
            callbacks=[controller],
            accumulate_grad_batches=accumulate,
            max_epochs=2,
            use_distributed_sampler=False,
        )
        trainer.fit(module, text_loader(samples(kind)[rank::2], batch_size=8))
        results.append(
            {
                "weights": weights(module),
                "errors": module.errors,
                "loss": trainer.callback_metrics["train/loss_epoch"],
                "size": controller.state_dict()["policy"]["size"],
                "decisions": [decision.to_json() for decision in decision_log(trainer)],
            }
        )
    torch.save(results, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict]]:
    return rank_results("tests.callbacks.test_batch_size_ddp", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_one_rank_out_of_memory(case: int, ranks: list[list[dict]], tmp_path: Path) -> None:
    kind, _, accumulate = CASES[case]
    first, second = ranks[0][case], ranks[1][case]
    assert torch.equal(first["weights"], second["weights"])
    assert (first["errors"], second["errors"]) == (0, 2)  # at 8 and at 4, on one rank only
    assert first["size"] == second["size"] == 2
    assert first["decisions"] == second["decisions"] != []

    alone = TokenModule(kind)
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=2)
    # Rank r took every second sample: batches of 8 each are one process's batches of 16.
    trainer.fit(alone, text_loader(samples(kind), batch_size=16))
    torch.testing.assert_close(first["weights"], weights(alone), rtol=1e-11, atol=1e-12)
    if kind == "samples":
        torch.testing.assert_close(first["loss"], trainer.callback_metrics["train/loss_epoch"], rtol=1e-6, atol=0)


if __name__ == "__main__":
    mp.start_processes(worker, args=(sys.argv[1], int(sys.argv[2])), nprocs=2, start_method="fork")
