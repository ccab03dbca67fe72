"""Gradients reduced while the last backward runs, in two real gloo processes: equal to reducing them afterwards."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from pytorch_lightning.strategies import DDPStrategy

from adaptrain import BatchSizeController, ConfigurationError, GradientNoiseScale
from adaptrain._lightning.closure import ClosureStep
from adaptrain.callbacks.base import decision_log
from adaptrain.execution.overlap import LastBackwardError, ProvenSizes
from adaptrain.execution.ranks import Ranks
from adaptrain.execution.split import Piece
from tests.callbacks.test_batch_size_ddp import TokenModule, samples
from tests.processes import rank_results
from tests.toys import join_ranks, quiet_trainer, text_loader, weights

UNUSED = "ddp_find_unused_parameters_true"
EPOCHS = 4  # of two batches each


class Failing(TokenModule):
    """Runs out of memory at chosen micro-batches, counted over all attempts."""

    def __init__(self, kind: str = "samples", *, at: tuple[int, ...] = (), phase: str = "backward") -> None:
        super().__init__(kind, phase=phase)
        self.at, self.calls = at, 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.most = 0 if self.calls in self.at else None
        return super().training_step(batch, batch_idx)


class SometimesUsed(pl.LightningModule):
    """Of three parameters beside one that is always used: one is in some samples' loss only, one in none's."""

    def __init__(self) -> None:
        super().__init__()
        names = ("always", "sometimes", "never")
        self.weights = torch.nn.ParameterDict({n: torch.nn.Parameter(torch.ones(4).double()) for n in names})
        self.missing: list[list[str]] = []

    def training_step(self, batch, batch_idx):
        loss = (batch @ self.weights["always"]).square().mean()
        if (batch[:, 0] > 0).all():
            loss = loss + (batch @ self.weights["sometimes"]).square().mean()
        return loss

    def on_before_optimizer_step(self, optimizer) -> None:
        self.missing.append([name for name, weight in self.weights.items() if weight.grad is None])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def some_signs(rank: int) -> torch.Tensor:
    """Rows of micro-batches of 2: the first of each batch, on rank 1, has what uses the parameter; one batch none."""
    rows = torch.randn(24, 4, generator=torch.Generator().manual_seed(rank)).double()
    rows[:, 0] = -rows[:, 0].abs()
    if rank == 1:
        for first in (0, 6, 18):
            rows[first : first + 2, 0] *= -1
    return rows


def uneven_split(batch: Any, size: int) -> list[Any]:
    """Three micro-batches of the rank's batch, or two: by where it is called."""
    size = min(size, 3 if torch.distributed.is_initialized() and torch.distributed.get_rank() else 5)
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, len(batch["labels"]), size)]


# By name: the loss's mean, micro-batch size, accumulated batches, own split, where rank 1 fails (which micro-batches).
CASES: dict[str, tuple[str, int, int, bool, tuple[int, ...], str]] = {
    "samples": ("samples", 3, 1, False, (), "forward"),
    "accumulated": ("samples", 3, 3, False, (), "forward"),
    "tokens": ("tokens", 3, 2, False, (), "forward"),
    "uneven": ("tokens", 8, 1, True, (), "forward"),
    "whole": ("samples", 8, 1, False, (), "forward"),
    # Batches of three micro-batches: 8 is the second of the third batch, 9 its last.
    "an earlier backward": ("samples", 3, 1, False, (8,), "backward"),
    "an earlier backward, accumulated": ("tokens", 3, 2, False, (11,), "backward"),
    "the last forward": ("samples", 3, 1, False, (9,), "forward"),
    "the last backward of a size that is new": ("samples", 8, 1, False, (1, 4), "backward"),
}


def train(folder: Path, case: str, *, overlap: bool, rank: int) -> dict[str, Any]:
    kind, size, accumulate, own, at, phase = CASES[case]
    counts = {"reduced": 0, "averaged": 0}
    reduce, average = ClosureStep.backward_and_reduce, Ranks.average_gradients

    def counted_reduce(self, loss):
        counts["reduced"] += 1
        reduce(self, loss)

    def counted_average(self, parameters):
        counts["averaged"] += 1
        average(self, parameters)

    ClosureStep.backward_and_reduce, Ranks.average_gradients = counted_reduce, counted_average
    module = Failing(kind, at=at if rank == 1 else (), phase=phase)
    controller = BatchSizeController(micro_batch_size=size, overlap=overlap, split=uneven_split if own else None)
    trainer = quiet_trainer(
        folder,
        strategy=UNUSED if kind == "tokens" else "ddp",  # the model's pooler is idle there
        devices=2,
        callbacks=[controller],
        accumulate_grad_batches=accumulate,
        max_epochs=EPOCHS,
        use_distributed_sampler=False,
    )
    trainer.fit(module, text_loader(samples(kind)[rank::2], batch_size=8))
    ClosureStep.backward_and_reduce, Ranks.average_gradients = reduce, average
    return counts | {
        "weights": weights(module),
        "errors": module.errors,
        "steps": trainer.global_step,
        "loss": trainer.callback_metrics["train/loss_epoch"],
        "decisions": [decision.to_json() for decision in decision_log(trainer)],
    }


def train_unused(folder: Path, strategy: str, *, overlap: bool, rank: int) -> dict[str, Any]:
    module = SometimesUsed()
    trainer = quiet_trainer(
        folder,
        strategy=strategy,
        devices=2,
        callbacks=[BatchSizeController(micro_batch_size=2, overlap=overlap)],
        use_distributed_sampler=False,
        max_epochs=2,
    )
    try:
        trainer.fit(module, torch.utils.data.DataLoader(some_signs(rank), batch_size=6))  # type: ignore[arg-type]
    except RuntimeError as error:
        return {"error": str(error)}
    return {"weights": weights(module), "missing": module.missing}


def refusal(folder: Path, **settings: Any) -> str:
    arguments = settings.pop("arguments", {})
    controller = BatchSizeController(micro_batch_size=3, overlap=True, **arguments)
    trainer = quiet_trainer(folder, **({"strategy": "ddp"} | settings), devices=2, callbacks=[controller])
    module = Failing()
    try:
        trainer.fit(module, text_loader(samples("samples"), batch_size=8))
    except ConfigurationError as error:
        assert not module.calls
        return str(error)
    return ""


def out_of_memory_while_reducing(folder: Path, rank: int) -> str:
    """Batch 3 of three micro-batches each: in the last of them, as large as one that has fitted."""
    module = Failing(at=(9,) if rank == 1 else ())
    trainer = quiet_trainer(
        folder,
        strategy="ddp",
        devices=2,
        callbacks=[BatchSizeController(micro_batch_size=3, overlap=True)],
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(module, text_loader(samples("samples"), batch_size=8))
    except LastBackwardError as error:
        return f"LastBackwardError: {error}"
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return ""


def worker(rank: int, folder: str, port: int) -> None:
    join_ranks(rank, port)
    warnings.simplefilter("ignore")
    root = Path(folder)
    results: dict[str, Any] = {
        case: {overlap: train(root, case, overlap=overlap, rank=rank) for overlap in (False, True)} for case in CASES
    }
    results["unused"] = {o: train_unused(root, UNUSED, overlap=o, rank=rank) for o in (False, True)}
    results["refused"] = {
        "noise": refusal(root, arguments={"global_batch_size": GradientNoiseScale(maximum=32)}),
        "static": refusal(root, strategy=DDPStrategy(static_graph=True)),
    }
    results["not looked for"] = train_unused(root, "ddp", overlap=True, rank=rank)
    torch.save(results, root / f"rank{rank}.pt")
    # Last: it leaves the other rank without a partner.
    results["lost"] = out_of_memory_while_reducing(root, rank)
    torch.save(results, root / f"rank{rank}.pt")
    if rank == 1:
        os._exit(0)  # as a process that ends with the error: its connections close


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return rank_results("tests.callbacks.test_batch_size_overlap_ddp", tmp_path_factory.mktemp("overlap"))


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_without_it_and_of_one_process(case: str, ranks: list[dict], tmp_path: Path) -> None:
    kind, _, accumulate, _, at, _ = CASES[case]
    first, second = (rank[case] for rank in ranks)
    assert torch.equal(first[True]["weights"], second[True]["weights"])
    torch.testing.assert_close(first[True]["weights"], first[False]["weights"], rtol=0, atol=1e-12)
    torch.testing.assert_close(first[True]["loss"], first[False]["loss"], rtol=1e-6, atol=0)

    alone = TokenModule(kind)
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=EPOCHS)
    trainer.fit(alone, text_loader(samples(kind), batch_size=16))
    torch.testing.assert_close(first[True]["weights"], weights(alone), rtol=1e-11, atol=1e-12)

    assert [first[True]["errors"], second[True]["errors"]] == [0, len(at)]
    assert first[True]["decisions"] == second[True]["decisions"]
    for rank in (first, second):
        assert (rank[False]["reduced"], rank[False]["averaged"]) == (0, rank[False]["steps"])
        # Each step is reduced once, by the one or the other: in the first no size is known to fit.
        assert rank[True]["reduced"] + rank[True]["averaged"] == rank[True]["steps"] == trainer.global_step
        assert rank[True]["reduced"] > 0
        assert rank[True]["averaged"] >= 1


def test_parameters_that_some_micro_batches_do_not_use(ranks: list[dict]) -> None:
    for rank in ranks:
        got, expected = rank["unused"][True], rank["unused"][False]
        torch.testing.assert_close(got["weights"], expected["weights"], rtol=0, atol=1e-12)
        assert got["missing"] == expected["missing"]
        # The third batch uses it on no rank, each other one in the first micro-batch of one rank only.
        assert got["missing"] == [["never"], ["never"], ["never", "sometimes"], ["never"]] * 2
    assert torch.equal(ranks[0]["unused"][True]["weights"], ranks[1]["unused"][True]["weights"])


def test_an_unused_parameter_that_ddp_does_not_look_for_raises(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "ddp_find_unused_parameters_true" in rank["not looked for"]["error"]
        assert "overlap=False" in rank["not looked for"]["error"]


def test_what_does_not_go_with_it_is_refused(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "GradientNoiseScale on several ranks" in rank["refused"]["noise"]
        assert "static_graph=True" in rank["refused"]["static"]
        assert all("overlap=False" in message for message in rank["refused"].values())


def test_memory_that_runs_out_while_reducing_raises_there_and_does_not_hang(ranks: list[dict]) -> None:
    assert ranks[1]["lost"].startswith("LastBackwardError: Memory ran out in the last backward of a step")
    assert "overlap=False, which survives this" in ranks[1]["lost"]
    assert "CUDA out of memory." in ranks[1]["lost"]
    assert ranks[0]["lost"].startswith("RuntimeError")  # gloo's: the connection is closed


def test_it_has_no_effect_on_one_rank(tmp_path: Path) -> None:
    found = []
    for overlap in (False, True):
        module = Failing(at=(8,))
        controller = BatchSizeController(micro_batch_size=3, overlap=overlap)
        quiet_trainer(tmp_path, callbacks=[controller]).fit(module, text_loader(samples("samples"), batch_size=8))
        assert module.errors == 1
        found.append(weights(module))
    assert torch.equal(*found)


def test_a_size_is_proven_by_one_as_large_after_an_optimizer_step() -> None:
    def piece(size: int, length: int) -> Piece:
        return Piece((0, size), None, length)

    proven = ProvenSizes()
    proven.add([piece(8, 8)])
    assert not proven.covers(piece(1, 1))  # the optimizer's state was still to come
    proven.stepped()
    proven.add([piece(2, 8), piece(4, 4), piece(2, 2)])
    assert proven.covers(piece(2, 8))
    assert proven.covers(piece(3, 4))
    assert not proven.covers(piece(3, 5))
    assert not proven.covers(piece(5, 1))
    proven.clear()
    assert not proven.covers(piece(1, 1))
    proven.add([piece(2, 2)])
    assert proven.covers(piece(2, 2))
    proven.restart()
    proven.add([piece(2, 2)])
    assert not proven.covers(piece(1, 1))  # there is more to keep state of, from the next optimizer step


if __name__ == "__main__":
    mp.start_processes(worker, args=(sys.argv[1], int(sys.argv[2])), nprocs=2, start_method="fork")
