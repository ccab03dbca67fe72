"""Run folders as training leaves them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptrain.decisions import Decision, DecisionLog
from adaptrain.report import Column, Constraint, Summary

DENSE = Column(
    params=3_212_000,
    flops=8_120_000_000,
    latency_ms=21.34,
    latency_input=(32, 128),
    size_bytes=12_848_000,
    metric=0.612,
)
FINAL = Column(
    params=1_430_000,
    flops=3_920_000_000,
    latency_ms=10.41,
    latency_input=(32, 128),
    size_bytes=5_848_000,
    metric=0.8812,
    test_metric=0.871,
    peak_memory_bytes=int(3.6 * 2**30),
    train_time_s=163.2,
)
LATENCY = Constraint(name="latency", limit=0.5, value=0.4878, met=True)
MEMORY = Constraint(name="memory_gib", limit=6.0, value=3.6, met=True)


def summary(**changes: Any) -> Summary:
    """A finished, pruned run; `changes` replace its fields."""
    base = Summary(
        experiment="quickstart",
        run_dir="runs/quickstart/one",
        seed=1,
        started="2026-01-31T12:00:00+00:00",
        status="finished",
        versions={"torch": "2.13.0"},
        hardware={"cores": 2},
        data={"train": 4000, "labels": ["web", "math"]},
        metric={"name": "val/accuracy", "mode": "max"},
        optimized_metric={"name": "val/accuracy", "value": 0.8812},
        dense=DENSE,
        dense_source="the dense model as measured at step 120, before the first structural event",
        final=FINAL,
        constraints=(LATENCY, MEMORY),
        decisions={"structure": 2},
    )
    return replace(base, **changes)


def plain_summary(**changes: Any) -> Summary:
    """A run without pruning or budget: nothing to compare with."""
    return summary(**{"dense": None, "dense_source": "", "constraints": (), "decisions": {}, **changes})


def decision(step: int, knob: str, old: Any, new: Any, reason: str, **more: Any) -> Decision:
    return Decision(step=step, knob=knob, old=old, new=new, reason=reason, **more)


DECISIONS = [
    decision(0, "micro_batch_size", 64, 32, "7.9 GiB at 64 samples would exceed the limit of 6.0 GiB; 32 fits"),
    decision(120, "structure", 3_212_000, 2_000_000, "event 1 of 2: removed 4 heads", readings={"latency": 0.7}),
    decision(120, "learning_rate", 1.0, 0.4, "warm up again after 38% of the parameters went"),
    decision(200, "structure", 2_000_000, 1_430_000, "event 2 of 2: removed 3 heads", readings={"latency": 0.49}),
    decision(210, "micro_batch_size", 32, 64, "pruning freed memory; 64 fits"),
]


def run_folder(folder: Path, *, summary: Summary | None, decisions: list[Decision] | None = None) -> Path:
    """Writes what a run leaves; `summary=None` is a run that was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "versions.json").write_text("{}")
    log = DecisionLog(folder / "decisions.jsonl")
    for item in DECISIONS if decisions is None else decisions:
        log.append(item)
    columns = ["adaptrain/lr/0", "adaptrain/lr/1", "adaptrain/host_rss_gib", "step", "train/loss", "val/accuracy"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step in range(0, 300, 10):
            writer.writerow(
                {"step": step, "train/loss": 2.0 - step / 200, "adaptrain/lr/0": 1e-3, "adaptrain/lr/1": 1e-3}
            )
            writer.writerow({"step": step, "adaptrain/host_rss_gib": 1.5})
            if step % 50 == 0:
                writer.writerow({"step": step, "val/accuracy": 0.5 + step / 1000})
    if summary is not None:
        replace(summary, run_dir=str(folder)).save()
    return folder
