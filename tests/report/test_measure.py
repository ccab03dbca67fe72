from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptrain import Budget, ConfigurationError
from adaptrain.report import Column, Summary, load_baseline, summarize
from tests.memory import room
from tests.report.samples import DECISIONS, decision, plain_summary, summary
from tests.toys import TextModule, tiny_bert

DATA = {"train": 4000, "labels": ("web", "math")}  # a tuple here, a list once it was JSON


def measured(module: Any | None = None, **changes: Any) -> Summary:
    settings: dict[str, Any] = {
        "module": module or TextModule(),
        "experiment": "quickstart",
        "run_dir": "runs/one",
        "seed": 1,
        "started": "2026-01-31T12:00:00",
        "status": "finished",
        "versions": {},
        "hardware": {},
        "data": DATA,
        "metric": "val/accuracy",
        "mode": "max",
        "final_metrics": {"val/accuracy": torch.tensor(0.75), "val/loss": 0.5},
        "test_metrics": {"test/accuracy": 0.7},
        "optimized_metric": "val/loss",
        "latency_input": (2, 8),
        "budget": Budget(),
        "decisions": [],
        "peak_memory_bytes": 2**30,
        "train_time_s": 90.0,
    }
    return summarize(**(settings | changes))


def pruning_report(**final: Any) -> dict[str, Any]:
    dense = {"params": 100, "flops": 1000, "latency_ms": 8.0, "size_bytes": 400}
    return {
        "dense": {**dense, "metrics": {"val/accuracy": 0.6, "val/loss": 0.9}, "step": 120},
        "final": {**dense, "params": 50, "flops": 500, "latency_ms": 4.1, "size_bytes": 200, **final},
        "latency_input": [4, 16],
        "constraints": [{"name": "latency", "limit": 0.5, "value": 0.5125, "met": False}],
        "events": 2,
    }


def limits(seen: Summary) -> Mapping[str, tuple[float | None, bool]]:
    return {constraint.name: (constraint.value, constraint.met) for constraint in seen.constraints}


def test_a_plain_run_has_one_measured_column() -> None:
    module = TextModule()
    seen = measured(module, decisions=DECISIONS)
    assert seen.dense is None
    assert seen.dense_source == ""
    assert seen.final.params == sum(parameter.numel() for parameter in module.parameters())
    assert seen.final.flops is not None
    assert seen.final.flops > 0
    assert seen.final.latency_ms is not None
    assert seen.final.latency_ms > 0
    assert seen.final.latency_input == (2, 8)
    assert (seen.final.metric, seen.final.test_metric) == (0.75, pytest.approx(0.7))
    assert seen.optimized_metric == {"name": "val/loss", "value": 0.5}
    assert seen.decisions == {"micro_batch_size": 2, "structure": 2, "learning_rate": 1}
    assert seen.constraints == ()
    assert module.training


def test_what_was_measured_can_be_saved_and_read(tmp_path: Path) -> None:
    written = measured(run_dir=tmp_path, data={"train": 4000}, decisions=DECISIONS, pruning_report=pruning_report())
    written.save()
    assert Summary.load(tmp_path) == written


def test_a_pruned_run_says_that_its_dense_metric_is_of_a_partly_trained_model() -> None:
    seen = measured(pruning_report=pruning_report())
    assert seen.dense == Column(
        params=100, flops=1000, latency_ms=8.0, latency_input=(4, 16), size_bytes=400, metric=0.6
    )
    assert seen.final.params == 50
    assert seen.final.latency_input == (4, 16)
    assert "as measured at step 120, before the first structural event" in seen.dense_source
    assert "val/accuracy is that of a partly trained model" in seen.dense_source


def test_a_dense_model_that_was_never_validated_has_costs_only() -> None:
    report = pruning_report()
    report["dense"] |= {"metrics": {}, "step": None}
    seen = measured(pruning_report=report)
    assert seen.dense is not None
    assert seen.dense.metric is None
    assert "not validated before the first structural event" in seen.dense_source


def test_pruning_without_a_target_reports_nothing_and_the_final_model_is_measured_here() -> None:
    seen = measured(pruning_report={})
    assert seen.dense is None
    assert seen.final.params > 100


def test_pruning_that_changed_nothing_leaves_nothing_to_compare() -> None:
    assert measured(pruning_report=pruning_report(params=100)).dense is None


def test_a_metric_that_is_missing_or_not_finite_is_no_number() -> None:
    seen = measured(final_metrics={"val/accuracy": float("nan")}, test_metrics={}, optimized_metric="val/loss")
    assert (seen.final.metric, seen.final.test_metric, seen.optimized_metric["value"]) == (None, None, None)


def test_the_budget_is_checked_where_pruning_did_not_answer() -> None:
    budget = Budget(latency=0.5, params_m=0.001, latency_ms=1e6, memory_gib=0.5, wall_clock_min=1.5)
    seen = measured(budget=budget)
    assert limits(seen) == {
        "latency": (1.0, False),
        "params_m": (seen.final.params / 1e6, False),
        "latency_ms": (seen.final.latency_ms, True),
        "memory_gib": (1.0, False),
        "wall_clock_min": (1.5, True),
    }
    pruned = measured(budget=Budget(latency=0.5, memory_gib=1.0), pruning_report=pruning_report())
    assert limits(pruned) == {"latency": (0.5125, False), "memory_gib": (1.0, True)}


def test_what_was_not_measured_does_not_count_as_kept() -> None:
    seen = measured(budget=Budget(memory_gib=1), peak_memory_bytes=None)
    assert limits(seen) == {"memory_gib": (None, False)}


def test_the_step_under_way_is_no_breach_of_the_wall_clock_but_a_long_overrun_is() -> None:
    assert limits(measured(budget=Budget(wall_clock_min=1.5), train_time_s=91.0))["wall_clock_min"][1]
    assert not limits(measured(budget=Budget(wall_clock_min=1.5), train_time_s=99.0))["wall_clock_min"][1]


def test_a_baseline_of_the_same_model_is_timed_again_beside_the_final_one() -> None:
    module = TextModule()
    params = sum(parameter.numel() for parameter in module.parameters())
    final = Column(params=params, latency_ms=1e9, latency_input=(2, 8), metric=0.8, test_metric=0.79, train_time_s=300)
    seen = measured(module, baseline=plain_summary(final=final, run_dir="runs/plain"))
    assert seen.dense is not None
    assert (seen.dense.metric, seen.dense.test_metric, seen.dense.train_time_s) == (0.8, 0.79, 300)
    assert seen.dense.latency_ms is not None
    assert seen.dense.latency_ms < 1e9
    assert seen.dense.flops == seen.final.flops
    assert seen.dense_source.startswith("baseline run runs/plain; its latency measured again here")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_what_finds_no_memory_to_be_measured_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    module = TextModule(tiny_bert(hidden=256, ffn=24_000))  # 96 MiB, and as much again for a copy to measure
    params = sum(parameter.numel() for parameter in module.parameters())
    recorded = Column(params=params, latency_ms=5.0, latency_input=(2, 8), metric=0.8)
    with room(48 * 2**20), caplog.at_level(logging.WARNING):
        seen = measured(module, baseline=plain_summary(final=recorded, run_dir="runs/plain"))
    assert seen.final.latency_ms is None
    assert seen.dense == recorded
    assert seen.dense_source == "baseline run runs/plain; its latency is as that run measured it"
    assert "no memory to measure the final model's latency (it takes 0.09 GiB" in caplog.text
    assert "no memory to measure the baseline's latency anew (it takes 0.28 GiB" in caplog.text


def test_a_baseline_beside_a_pruned_run_takes_the_costs_that_pruning_measured() -> None:
    baseline = plain_summary(final=Column(params=100, latency_ms=99.0, latency_input=(1, 1), metric=0.8))
    seen = measured(baseline=baseline, pruning_report=pruning_report())
    assert seen.dense is not None
    assert (seen.dense.metric, seen.dense.latency_ms, seen.dense.latency_input) == (0.8, 8.0, (4, 16))
    assert seen.final.latency_ms == 4.1
    assert "measured again" in seen.dense_source


def test_a_baseline_of_another_model_keeps_its_own_costs_and_says_so() -> None:
    other = Column(params=7, flops=9, latency_ms=3.0, latency_input=(2, 8), metric=0.8)
    seen = measured(baseline=plain_summary(final=other))
    assert seen.dense == other
    assert "another model; its latency is as that run measured it" in seen.dense_source
    elsewhere = measured(baseline=plain_summary(final=replace(other, latency_input=(1, 1)))).dense
    assert elsewhere is not None
    assert (elsewhere.flops, elsewhere.latency_ms) == (None, None)


def test_a_model_without_a_dense_twin_keeps_the_recorded_latency() -> None:
    class Unknown(torch.nn.Module):
        """A model no family is declared for, costs measured like any other's."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)
            self.config = tiny_bert().config

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids.float()[:, :4])

    module = torch.nn.Module()
    module.model = Unknown()
    recorded = Column(params=20, flops=1, latency_ms=5.0, latency_input=(2, 8), metric=0.8)
    seen = measured(module, baseline=plain_summary(final=recorded))
    assert seen.dense == recorded
    assert "as that run measured it" in seen.dense_source


def test_a_baseline_of_the_same_data_is_accepted(tmp_path: Path) -> None:
    plain_summary(data=DATA).save(tmp_path)
    assert load_baseline(tmp_path, data=DATA, metric="val/accuracy").run_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("baseline", "seen"),
    [
        (plain_summary(data={**DATA, "train": 9}), r"other data \(train: 9 there, 4000 here\)"),
        (
            plain_summary(data=DATA, metric={"name": "val/perplexity", "mode": "min"}),
            "val/perplexity, not val/accuracy",
        ),
        (plain_summary(data=DATA, status="interrupted"), "interrupted"),
        (summary(data=DATA), r"itself pruned.*callbacks=none"),
    ],
)
def test_a_baseline_that_cannot_compare_is_refused(tmp_path: Path, baseline: Summary, seen: str) -> None:
    baseline.save(tmp_path)
    with pytest.raises(ConfigurationError, match=seen):
        load_baseline(tmp_path, data=DATA, metric="val/accuracy")


def test_a_classifier_may_read_the_same_text_otherwise_a_language_model_may_not(tmp_path: Path) -> None:
    there = {"source": "corpus", "task": "classification", "tokenizer": "one", "max_length": 64, "notes": ["cut"]}
    here = there | {"tokenizer": "two", "max_length": 128, "notes": []}
    plain_summary(data=there).save(tmp_path)
    assert load_baseline(tmp_path, data=here, metric="val/accuracy").data == there
    plain_summary(data=there | {"task": "language_model"}).save(tmp_path)
    with pytest.raises(ConfigurationError, match="max_length: 64 there, 128 here; tokenizer: 'one' there"):
        load_baseline(tmp_path, data=here | {"task": "language_model"}, metric="val/accuracy")


def test_a_baseline_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no finished run"):
        load_baseline(tmp_path, data=DATA, metric="val/accuracy")


def test_dry_run_decisions_are_counted_too() -> None:
    assert measured(decisions=[decision(1, "structure", 2, 1, "", applied=False)]).decisions == {"structure": 1}
