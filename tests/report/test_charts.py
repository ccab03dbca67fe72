from __future__ import annotations

from pathlib import Path

import pytest

from adaptrain.report.charts import MAX_POINTS, Chart, charts, read_metrics
from tests.report.samples import DECISIONS, decision, run_folder


def by_title(folder: Path, **settings: object) -> dict[str, Chart]:
    given = {"metric": "val/accuracy", "memory_limit_gib": None, "decisions": DECISIONS} | settings
    decisions = given.pop("decisions")
    return {chart.title: chart for chart in charts(read_metrics(folder), decisions, **given)}  # type: ignore[arg-type]


def test_every_picture_of_a_full_run(tmp_path: Path) -> None:
    run_folder(tmp_path, summary=None)
    drawn = by_title(tmp_path, memory_limit_gib=4.0)
    assert list(drawn) == [
        *("Loss", "val/accuracy", "Effective learning rate", "Micro-batch size", "Cost of the model", "Memory")
    ]
    assert drawn["Loss"].marks == (120, 200)
    assert drawn["Memory"].limit == 4.0
    rates = drawn["Effective learning rate"]
    assert (rates.scale, len(rates.series)) == ("log", 1)  # two groups at one rate are one line
    sizes = drawn["Micro-batch size"].series[0]
    assert (sizes.steps, sizes.values) == ((0, 210, 290), (32, 64, 64))
    costs = {line.label: line.values for line in drawn["Cost of the model"].series}
    assert costs["latency (estimated)"] == (1.0, 0.7, 0.49, 0.49)
    assert costs["parameters"] == pytest.approx((1.0, 0.6227, 0.4452, 0.4452), abs=1e-4)


def test_no_data_no_picture(tmp_path: Path) -> None:
    assert charts(read_metrics(tmp_path), [], metric="val/accuracy", memory_limit_gib=4.0) == []


def test_dry_run_decisions_move_nothing(tmp_path: Path) -> None:
    watched = [
        decision(5, "structure", 100, 50, "", applied=False),
        decision(6, "micro_batch_size", 8, 4, "", applied=False),
    ]
    assert charts(read_metrics(tmp_path), watched, metric=None, memory_limit_gib=None) == []


def test_a_file_cut_short_gives_what_it_holds(tmp_path: Path) -> None:
    text = "step,train/loss,val/loss\n0,2.0,\n1,nan,1.5\n2,inf,\n3,1.0,0.9\n,7,\n4,0.5"
    (tmp_path / "metrics.csv").write_text(text)
    assert read_metrics(tmp_path) == {"train/loss": ([0, 3, 4], [2, 1, 0.5]), "val/loss": ([1, 3], [1.5, 0.9])}


@pytest.mark.parametrize("text", ["", "step\n", "epoch,train/loss\n0,1\n", "\x00\xff garbage"])
def test_a_file_without_metrics_is_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text, encoding="latin-1")
    assert read_metrics(tmp_path) == {}


def test_a_long_run_is_thinned_to_means_and_keeps_its_extent(tmp_path: Path) -> None:
    rows = "".join(f"{step},{step % 2}\n" for step in range(10_000))
    (tmp_path / "metrics.csv").write_text("step,train/loss\n" + rows)
    line = by_title(tmp_path, decisions=[])["Loss"].series[0]
    assert len(line.steps) <= MAX_POINTS
    assert line.values[0] == pytest.approx(0.5, abs=0.1)
    assert line.steps[-1] > 9_900


def test_a_log_axis_gets_positive_numbers_only(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,adaptrain/lr/0,adaptrain/lr/1\n0,0.0,0\n1,0.1,0\n2,0.0,0\n")
    assert [line.values for line in by_title(tmp_path, decisions=[])["Effective learning rate"].series] == [(0.1,)]


def test_a_picture_is_described_in_words(tmp_path: Path) -> None:
    run_folder(tmp_path, summary=None)
    words = by_title(tmp_path, memory_limit_gib=4.0)["Memory"].description
    assert words == (
        "Memory (GiB) over optimizer steps. host rss: 1.50 at step 0, 1.50 at step 290;"
        " structural events at step 120, 200; limit 4.00."
    )


def test_an_unfinished_run_finds_its_metric_by_itself(tmp_path: Path) -> None:
    run_folder(tmp_path, summary=None)
    assert "val/accuracy" in by_title(tmp_path, metric=None)


def test_both_batch_sizes_share_a_picture() -> None:
    grown = [*DECISIONS, decision(250, "global_batch_size", 64, 128, "the gradient noise scale is 300")]
    drawn = {chart.title: chart for chart in charts({}, grown, metric=None, memory_limit_gib=None)}
    assert [line.label for line in drawn["Batch size"].series] == ["micro-batch", "global batch"]
    assert drawn["Batch size"].series[1].values == (64, 128, 128)


def test_the_size_of_evaluation_is_not_drawn_as_the_one_of_training() -> None:
    stage = decision(250, "micro_batch_size", 64, 4, "ran out in validation", readings={"stage": "validation"})
    grown = [*DECISIONS, decision(250, "global_batch_size", 64, 128, "the noise scale is 300"), stage]
    drawn = {chart.title: chart for chart in charts({}, grown, metric=None, memory_limit_gib=None)}
    assert 4 not in drawn["Batch size"].series[0].values
