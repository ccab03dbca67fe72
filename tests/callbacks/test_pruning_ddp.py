"""Two real processes through two events. Also the script that each of them runs."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptrain import CubicSchedule, ProgressivePruning
from adaptrain.callbacks.base import decision_log
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from tests.processes import run_ranks
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, weights

pytestmark = pytest.mark.slow

RUNS: dict[str, dict[str, Any]] = {
    "both": {"target": {"flops": 0.5}, "latency_input": [8, 16], "reconstruct": True},
    # 7 of 8 heads: a layer is left with none, and its parameters are empty.
    "heads": {"target": {"params": 0.67}, "groups": ["heads"], "importance": "magnitude"},
    "layers": {"target": {"flops": 0.04}, "groups": ["heads", "ffn", "layers"], "latency_input": [8, 16]},
    "latency": {"target": {"latency": 0.95}, "latency_input": [4, 8]},
}


def fit(folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    callback = ProgressivePruning(schedule=CubicSchedule(begin=0.3, end=0.7, events=2), **RUNS[name])
    trainer = quiet_trainer(folder, callbacks=[callback], max_epochs=2, **settings)
    module = TextModule().double()
    samples = text_samples(96)
    if settings:  # each rank every other sample: together the batches of one process
        loader = text_loader(samples[int(os.environ["LOCAL_RANK"]) :: 2])
    else:
        loader = text_loader(samples, batch_size=16)
    trainer.fit(module, loader)
    return {
        "weights": weights(module).tolist(),
        "structure": structures.current(find_family(module)),
        "events": len([d for d in decision_log(trainer) if d.knob == "structure"]),
        "shapes": [list(parameter.shape) for parameter in module.parameters()],
        "report": callback.report(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    for done in run_ranks(__name__, folder):
        assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_ranks_end_bit_identical(ranks, name) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first == second
    assert first["events"] >= 1


def test_every_rank_went_through_both_events(ranks) -> None:
    assert ranks[1]["both"]["events"] == 2
    assert [] in [layer["heads"] for layer in ranks[0]["heads"]["structure"]]
    assert any(map(structures.is_dropped, ranks[0]["layers"]["structure"]))


def test_two_ranks_equal_one_process_on_the_same_batches(ranks, tmp_path) -> None:
    alone = fit(tmp_path, "both")
    assert alone["structure"] == ranks[0]["both"]["structure"]
    assert alone["weights"] == pytest.approx(ranks[0]["both"]["weights"], rel=1e-6, abs=1e-9)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    root, rank = Path(sys.argv[1]), os.environ["LOCAL_RANK"]
    results = {name: fit(root / name, name, devices=2, strategy="ddp", use_distributed_sampler=False) for name in RUNS}
    (root / f"rank{rank}.json").write_text(json.dumps(results))
