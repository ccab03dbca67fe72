"""A real memory limit: where plain Lightning dies, the controller finishes with the weights of an unlimited run."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from adaptrain import BatchSizeController
from adaptrain.callbacks.base import decision_log
from tests.memory import LIMITED, MIB
from tests.toys import quiet_trainer, weights

ROOT = Path(__file__).parents[2]
BATCH, WIDTH = 32, 2**17  # one activation of the whole batch: 16 MiB in fp32

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")


class Wide(pl.LightningModule):
    """Few parameters, large activations: more than ten of the whole batch's 16 MiB live at once."""

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__()
        self.loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=BATCH)
        generator = torch.Generator().manual_seed(0)
        self.scales = nn.ParameterList(torch.rand(WIDTH, generator=generator) for _ in range(6))

    def training_step(self, batch, batch_idx):
        x = batch[0]
        for scale in self.scales:
            x = torch.tanh(x * scale)
        return (x - 0.1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def child(folder: Path) -> None:
    import resource

    from adaptrain.resources.peak import proc_status_bytes

    torch.set_num_threads(1)

    data = torch.rand(2 * BATCH, WIDTH, generator=torch.Generator().manual_seed(1))

    def train(epochs: int, *callbacks) -> tuple[torch.Tensor, list]:
        module = Wide(data)
        trainer = quiet_trainer(folder, callbacks=list(callbacks), max_epochs=epochs)
        trainer.fit(module, module.loader)
        return weights(module), list(decision_log(trainer)) if callbacks else []

    runs = {"replayed": (2, BATCH), "predicted": (10, "auto")}
    unlimited = {name: train(epochs)[0] for name, (epochs, _) in runs.items()}
    gc.collect()
    limit = (proc_status_bytes("VmSize") or 0) + 160 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    results: dict = {"plain": "finished"}
    try:
        train(1)
    except RuntimeError as error:
        results["plain"] = str(error)
    for name, (epochs, size) in runs.items():
        gc.collect()
        ours, decisions = train(epochs, BatchSizeController(micro_batch_size=size))
        results[name] = {
            "difference": float((ours - unlimited[name]).abs().max() / unlimited[name].abs().max()),
            "reasons": [decision.reason for decision in decisions],
        }
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("rlimit")
    command = [sys.executable, "-m", "tests.callbacks.test_batch_size_rlimit", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | LIMITED, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return json.loads((folder / "results.json").read_text())


def test_plain_lightning_dies_there(results: dict) -> None:
    assert "can't allocate memory" in results["plain"]


def test_the_same_samples_run_again_smaller(results: dict) -> None:
    replayed = results["replayed"]
    assert replayed["difference"] < 1e-5
    assert "Memory ran out at 32 samples" in replayed["reasons"][0]


def test_prediction_avoids_the_error(results: dict) -> None:
    predicted = results["predicted"]
    assert predicted["difference"] < 1e-5
    assert not any("ran out" in reason for reason in predicted["reasons"])
    assert any("Tries" in reason for reason in predicted["reasons"])


if __name__ == "__main__":
    child(Path(sys.argv[1]))
