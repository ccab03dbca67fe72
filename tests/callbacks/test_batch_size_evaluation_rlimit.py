"""A real memory limit: where plain Lightning's predict dies, the controller finishes with equal predictions."""

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

from adaptrain import BatchSizeController
from adaptrain.callbacks.base import decision_log
from tests.memory import LIMITED, MIB
from tests.toys import quiet_trainer

ROOT = Path(__file__).parents[2]
BATCH, WIDTH = 64, 2**17  # one activation of the whole batch: 32 MiB in fp32

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")


class Wide(pl.LightningModule):
    """No parameters, and activations that are all held until the end."""

    def predict_step(self, batch, batch_idx):
        layers = [batch[0]]
        for _ in range(6):
            layers.append(torch.tanh(layers[-1] + 0.1))
        return {"mean": layers[-1].mean(1), "corner": (layers[-1][:, :2], layers[0][:, -1])}


def child(folder: Path) -> None:
    import resource

    from adaptrain.resources.peak import proc_status_bytes

    torch.set_num_threads(1)
    data = torch.rand(2 * BATCH, WIDTH, generator=torch.Generator().manual_seed(1))

    def predict(*callbacks) -> tuple[list, list[str]]:
        trainer = quiet_trainer(folder, callbacks=list(callbacks))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=BATCH)
        predictions = trainer.predict(Wide(), loader)
        return predictions, [decision.reason for decision in decision_log(trainer)] if callbacks else []

    unlimited, _ = predict()
    gc.collect()
    limit = (proc_status_bytes("VmSize") or 0) + 160 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    results: dict = {"plain": "finished"}
    try:
        predict()
    except RuntimeError as error:
        results["plain"] = str(error)
    gc.collect()
    ours, results["reasons"] = predict(BatchSizeController())
    pairs = [
        pair
        for one, other in zip(ours, unlimited, strict=True)
        for pair in ((one["mean"], other["mean"]), *zip(one["corner"], other["corner"], strict=True))
    ]
    results["equal"] = [torch.equal(one, other) for one, other in pairs]
    (folder / "results.json").write_text(json.dumps(results))


def test_plain_predict_dies_and_ours_ends_with_equal_predictions(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.test_batch_size_evaluation_rlimit", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | LIMITED, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert "can't allocate memory" in results["plain"]
    assert results["equal"] == [True] * 6
    assert f"ran out in predict at {BATCH} samples" in results["reasons"][0]


if __name__ == "__main__":
    child(Path(sys.argv[1]))
