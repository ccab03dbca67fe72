from __future__ import annotations

from pathlib import Path

from adaptrain.report import Summary
from tests.app.conftest import Command


def test_jobs_lie_side_by_side_and_are_compared(command: Command, tiny: list[str], workplace: Path) -> None:
    result = command("-m", *tiny, "callbacks=none", "seed=1,2", "experiment_name=toy", "optimized_metric=val/loss")
    assert result.code == 0, result.err
    (sweep,) = (workplace / "runs" / "toy").iterdir()
    assert sweep.name.startswith("sweep-")
    jobs = [sweep / "0", sweep / "1"]
    assert sorted(path for path in sweep.iterdir() if path.is_dir()) == jobs
    assert {path.name for path in workplace.iterdir()} == {"runs"}
    table = result.out[result.out.index("2 jobs of") :]
    for seed, job in zip((1, 2), jobs, strict=True):
        summary = Summary.load(job)
        assert summary.seed == seed
        assert summary.optimized_metric["name"] == "val/loss"
        assert f"seed={seed}" in table
        assert f"{summary.optimized_metric['value']:.4g}" in table
    assert "val/loss" in table


def test_a_refused_job_does_not_end_the_others(command: Command, tiny: list[str], workplace: Path) -> None:
    result = command("-m", *tiny, "callbacks=none", "budget.latency=1.5,0.5")
    assert result.code == 1
    assert "budget.latency" in result.err
    assert "no result" in result.out
    (sweep,) = (workplace / "runs" / "train").iterdir()
    assert {path.name for path in sweep.iterdir()} == {"multirun.yaml", "1"}
    assert Summary.load(sweep / "1").status == "finished"


def test_a_sweep_of_refused_jobs_leaves_nothing(command: Command, tiny: list[str], workplace: Path) -> None:
    result = command("-m", *tiny, "budget.latency=1.5,2.5")
    assert result.code == 1
    assert "Traceback" not in result.err
    assert list(workplace.iterdir()) == []


def test_a_sweep_that_cannot_be_composed_leaves_nothing(command: Command, workplace: Path) -> None:
    result = command("-m", "+experiment=quickstart,nope")
    assert result.code == 1
    assert "nope" in result.err
    assert "Traceback" not in result.err
    assert list(workplace.iterdir()) == []


def test_results_of_an_earlier_folder_are_left_alone(command: Command, tiny: list[str], workplace: Path) -> None:
    (workplace / "runs" / "train" / "mine").mkdir(parents=True)
    assert command("-m", *tiny, "budget.latency=1.5,2.5").code == 1
    assert [path.name for path in (workplace / "runs" / "train").iterdir()] == ["mine"]


def test_a_second_sweep_of_the_same_name_has_a_folder_of_its_own(
    command: Command, tiny: list[str], workplace: Path
) -> None:
    for seed in (1, 2):
        arguments = ["callbacks=none", "trainer.max_steps=1", f"seed={seed}", r"hydra.sweep.dir='my sweep\'s'"]
        assert command("-m", *tiny, *arguments).code == 0
    assert sorted(path.name for path in workplace.iterdir()) == ["my sweep's", "my sweep's_2"]
    assert Summary.load(workplace / "my sweep's" / "0").seed == 1
    assert Summary.load(workplace / "my sweep's_2" / "0").seed == 2
