"""BatchSizeController on a CUDA device: real errors of its allocator, and another process on the same device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptrain import BatchSizeController
from adaptrain.callbacks.base import decision_log
from tests.memory import BATCH, MIB, LongSequences, Taker, TakesFor, long_batches
from tests.toys import quiet_trainer, weights

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _unlimited() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    torch.cuda.empty_cache()


def allow(room_mib: int) -> None:
    """Limits this process to so much more than it holds."""
    gc.collect()  # a trainer that failed
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(0)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + room_mib * MIB) / total, 0)


class _TakesInBackward(torch.autograd.Function):
    """Passes on; its backward takes as much as eight of its inputs, while all activations are held."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, owner: Hungry) -> torch.Tensor:
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradients[0]
        ctx.owner.backward_sizes.append(len(gradient))
        return gradient + torch.zeros(8, *gradient.shape, device=gradient.device).sum(0), None


class Hungry(LongSequences):
    def __init__(self) -> None:
        super().__init__()
        self.backward_sizes: list[int] = []

    def loss(self, batch: Any) -> torch.Tensor:
        x = self.embed[batch["input_ids"]]
        for scale in self.scales:
            x = torch.tanh(x * scale)
        return (_TakesInBackward.apply(x, self).mean(dim=(1, 2)) - 0.1).square().mean()


class Linears(LongSequences):
    """Layers that autocast runs in bfloat16: 32 MiB of activations each for 16 x 2048 columns."""

    WIDTH = 512

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(torch.rand(10, self.WIDTH))
        self.scales = nn.ParameterList()
        self.layers = nn.ModuleList(nn.Linear(self.WIDTH, self.WIDTH) for _ in range(12))

    def loss(self, batch: Any) -> torch.Tensor:
        x = self.embed[batch["input_ids"]]
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x.float().mean(dim=(1, 2)) - 0.1).square().mean()


class Validated(LongSequences):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))


def fit(module: Any, root: Path, *callbacks: Any, length: int = 128, steps: int = 4, **kwargs: Any) -> Any:
    trainer = quiet_trainer(root, callbacks=list(callbacks), accelerator="gpu", **kwargs)
    loader: Any = torch.utils.data.DataLoader(long_batches([length] * steps), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return trainer


# An activation of the whole batch of 128 columns takes 16 MiB. Forward holds eight or nine; backward takes eight more.
@pytest.mark.parametrize(("phase", "room_mib"), [("forward", 100), ("backward", 220)])
def test_a_real_error_is_survived_with_the_weights_of_an_unlimited_run(
    phase: str, room_mib: int, tmp_path: Path
) -> None:
    unlimited, ours = Hungry(), Hungry()
    fit(unlimited, tmp_path)
    allow(room_mib)
    with pytest.raises(torch.OutOfMemoryError):
        fit(Hungry(), tmp_path)
    allow(room_mib)
    trainer = fit(ours, tmp_path, BatchSizeController(micro_batch_size=BATCH))
    torch.testing.assert_close(weights(ours), weights(unlimited), rtol=1e-5, atol=1e-6)
    assert f"Memory ran out at {BATCH} samples" in next(iter(decision_log(trainer))).reason
    assert (ours.backward_sizes[0] == BATCH) == (phase == "backward")
    assert [sum(sizes) for sizes in ours.ran[1:]] == [BATCH] * 3  # only the first step met the error


def test_the_search_stays_below_the_share_without_an_error(tmp_path: Path) -> None:
    unlimited, ours = LongSequences(), LongSequences()
    fit(unlimited, tmp_path, steps=24)
    allow(150)  # the whole batch takes more in backward
    trainer = fit(ours, tmp_path, BatchSizeController(), steps=24)
    torch.testing.assert_close(weights(ours), weights(unlimited), rtol=1e-5, atol=1e-6)
    assert max(max(sizes) for sizes in ours.ran) < BATCH
    assert [sum(sizes) for sizes in ours.ran] == [BATCH] * 24
    assert decision_log(trainer)


def test_it_gives_way_to_another_process_on_the_device_and_grows_back(tmp_path: Path) -> None:
    module = LongSequences()
    taker = TakesFor(Taker(Taker.CUDA), first=5, last=15)
    trainer = fit(module, tmp_path, taker, BatchSizeController(micro_batch_size=BATCH), steps=60)
    largest = [max(sizes) for sizes in module.ran]
    assert largest[:5] == [BATCH] * 5
    assert max(largest[6:15]) < BATCH
    assert largest[25:] == [BATCH] * 35
    taken, back = decision_log(trainer)
    assert "Memory was taken" in taken.reason
    assert "Memory is back" in back.reason


def test_under_bfloat16_autocast(tmp_path: Path) -> None:
    begin, unlimited, ours = weights(Linears()), Linears(), Linears()
    fit(unlimited, tmp_path, length=2048, precision="bf16-mixed")
    allow(300)  # the whole batch takes more than 400 MiB
    with pytest.raises(torch.OutOfMemoryError):
        fit(Linears(), tmp_path, length=2048, precision="bf16-mixed")
    allow(300)
    trainer = fit(ours, tmp_path, BatchSizeController(micro_batch_size=BATCH), length=2048, precision="bf16-mixed")
    assert "Memory ran out" in next(iter(decision_log(trainer))).reason
    update = weights(unlimited).cpu() - begin
    assert (weights(ours).cpu() - weights(unlimited).cpu()).norm() < 0.05 * update.norm()


def test_validation_survives_too(tmp_path: Path) -> None:
    def validate(*callbacks: Any) -> tuple[float, list[str]]:
        trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), accelerator="gpu")
        loader: Any = torch.utils.data.DataLoader(long_batches([512, 512]), batch_size=None)  # type: ignore[arg-type]
        [values] = trainer.validate(Validated(), loader, verbose=False)
        return values["val/loss"], [decision.reason for decision in decision_log(trainer)] if callbacks else []

    expected, _ = validate()
    allow(130)  # three tensors of 64 MiB live at once
    with pytest.raises(torch.OutOfMemoryError):
        validate()
    allow(130)
    got, reasons = validate(BatchSizeController())
    assert got == pytest.approx(expected, rel=1e-5)
    assert f"ran out in validation at {BATCH} samples" in reasons[0]
