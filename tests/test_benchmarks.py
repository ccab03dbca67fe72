"""The benchmarks' own machinery: trainings that take turns, and a small run of every part that needs no data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, weights

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_trainings_in_turns_end_as_each_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from lockstep import lockstep

    order: list[tuple[str, int]] = []
    modules = {"slow": TextModule(lr=1e-3), "fast": TextModule(lr=1e-2)}

    def train(name: str, *callbacks) -> None:
        module = modules[name]
        step = module.training_step
        module.training_step = lambda batch, index: (order.append((name, index)), step(batch, index))[1]
        quiet_trainer(tmp_path, callbacks=list(callbacks)).fit(module, text_loader(text_samples(48)))

    times = lockstep({name: lambda turn, name=name: train(name, turn) for name in modules}, steps=3, warmup=2)
    assert {name: len(taken) for name, taken in times.items()} == {"slow": 3, "fast": 3}
    for round_number in range(5):  # one batch of each in every round
        assert sorted(order[2 * round_number : 2 * round_number + 2]) == [
            ("fast", round_number),
            ("slow", round_number),
        ]
    for name, lr in (("slow", 1e-3), ("fast", 1e-2)):
        alone = TextModule(lr=lr)
        quiet_trainer(tmp_path).fit(alone, text_loader(text_samples(48)))
        torch.testing.assert_close(weights(modules[name]), weights(alone), rtol=0, atol=0)


@pytest.mark.slow
def test_the_memory_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    command = [sys.executable, str(SCRIPTS / "benchmark_memory.py"), "--json", str(out), "--repeats", "1"]
    command += ["--batch-sizes", "8", "--samples", "48", "--fixed-batch-size", "8", "--overhead-steps", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert {row["part"] for row in rows} == {"speed", "fixed", "overhead", "errors"}
    disturbed = [row for row in rows if row.get("arm") == "ours, errors"]
    assert sum(row["forward"] + row["backward"] + row["optimizer"] + row["transfer"] for row in disturbed) > 0
    assert all(row["samples_lost_or_repeated"] == 0 for row in disturbed)


def test_the_memory_benchmark_refuses_half_an_encoder(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "benchmark_memory.py"), "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--model and --data go together" in done.stderr
