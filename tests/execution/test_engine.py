"""The engine with real memory: it stays below a limit by prediction, and measures when the limit moves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from adaptrain import BatchSizeController
from adaptrain.callbacks.base import decision_log
from adaptrain.execution.memory import GIB, StepMemory
from adaptrain.resources.host import PeakMemory, process_memory_bytes
from tests.toys import quiet_trainer, weights

BATCH, WIDTH = 16, 2048


class LongSequences(pl.LightningModule):
    """About 128 KiB of activations per column of the whole batch in each of six layers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.rand(10, WIDTH, generator=generator))
        self.scales = nn.ParameterList(torch.rand(WIDTH, generator=generator) for _ in range(6))

    def training_step(self, batch, batch_idx):
        x = self.embed[batch["input_ids"]]
        for scale in self.scales:
            x = torch.tanh(x * scale)
        return (x.mean(dim=(1, 2)) - 0.1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def batches(lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(10, (BATCH, length), generator=generator),
            "attention_mask": torch.ones(BATCH, length, dtype=torch.long),
        }
        for length in lengths
    ]


def train(root: Path, *callbacks):
    module = LongSequences()
    trainer = quiet_trainer(root, callbacks=list(callbacks))
    loader = torch.utils.data.DataLoader(batches([24, 48, 32, 48, 320, 48]), batch_size=None)
    with PeakMemory() as peak:
        trainer.fit(module, loader)
    return weights(module), peak.read(), trainer


def stays_below_the_limit_by_prediction(tmp_path: Path) -> None:
    expected, plain_peak, _ = train(tmp_path)
    limit = process_memory_bytes() + 240 * 2**20
    assert plain_peak > limit  # else this shows nothing
    got, peak, trainer = train(tmp_path, BatchSizeController(micro_batch_size=BATCH, memory_limit_gib=limit / GIB))
    assert peak < limit
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    [decision] = decision_log(trainer)
    assert "A batch as long as this one" in decision.reason
    assert decision.new < BATCH
    assert decision.readings["predicted_gib"] > decision.readings["limit_gib"]


def measures_the_peak_of_a_step(_: Path) -> None:
    memory = StepMemory(torch.device("cpu"), limit_gib=None, fraction=0.9)
    memory.start()
    block = torch.ones(2**26)
    del block
    assert memory.stop() - memory.floor_bytes > 200 * 2**20


@pytest.mark.parametrize("check", [stays_below_the_limit_by_prediction, measures_the_peak_of_a_step])
def test_in_a_fresh_process(check, tmp_path: Path) -> None:
    """What earlier tests left in this process's heap would be used again or freed in the middle of a measurement."""
    command = [sys.executable, "-m", "tests.execution.test_engine", check.__name__, str(tmp_path)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_limit_is_the_tightest_there_is() -> None:
    cpu = torch.device("cpu")
    all_there_is = StepMemory(cpu, limit_gib=None, fraction=1.0).limit_bytes()
    assert StepMemory(cpu, limit_gib=1.5, fraction=1.0).limit_bytes() == 1.5 * GIB
    assert StepMemory(cpu, limit_gib=10**6, fraction=0.5).limit_bytes() < all_there_is
    assert "GiB allowed" in StepMemory(cpu, limit_gib=None, fraction=0.9).report()


@pytest.mark.gpu
def test_on_a_cuda_device_tensors_are_counted() -> None:
    device = torch.device("cuda:0")
    memory = StepMemory(device, limit_gib=1.0, fraction=0.9)
    memory.start()
    block = torch.ones(2**26, device=device)
    del block
    assert memory.stop() - memory.floor_bytes >= 2**28
    assert memory.limit_bytes() == GIB
    assert memory.fingerprint()["device"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
