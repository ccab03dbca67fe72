from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptrain import ConfigurationError
from adaptrain.report import Summary
from tests.report.samples import plain_summary, summary


@pytest.mark.parametrize("written", [summary(), plain_summary()], ids=["two columns", "one column"])
def test_a_summary_is_read_back_as_it_was_written(tmp_path: Path, written: Summary) -> None:
    written = replace(written, run_dir=str(tmp_path))
    written.save()
    assert Summary.load(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_moved_run_lies_where_it_was_read_from(tmp_path: Path) -> None:
    summary(run_dir="elsewhere").save(tmp_path)
    assert Summary.load(tmp_path).run_dir == str(tmp_path)


def test_the_file_has_the_documented_keys(tmp_path: Path) -> None:
    values = json.loads(summary().save(tmp_path).read_text())
    assert set(values) == {
        *("experiment", "run_dir", "seed", "started", "status", "versions", "hardware", "data", "metric"),
        *("optimized_metric", "dense", "dense_source", "final", "constraints", "decisions"),
    }
    assert values["final"]["latency_input"] == [32, 128]
    assert values["constraints"][0] == {"name": "latency", "limit": 0.5, "value": 0.4878, "met": True}


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no run folder .*nowhere"):
        Summary.load(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"no finished run.*resume="):
        Summary.load(tmp_path)


def _without_seed(values: dict[str, Any]) -> None:
    del values["seed"]


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (_without_seed, "lacks seed"),
        (lambda values: values.update(colour="red"), "unknown colour"),
        (lambda values: values["final"].update(params="many"), r"final\.params must be a number, not 'many'"),
        (lambda values: values["final"].update(params=None), r"final\.params must be a number"),
        (lambda values: values["final"].update(latency_input=[32]), "two whole numbers"),
        (lambda values: values["constraints"][0].update(met="yes"), r"constraints\.met must be a bool"),
        (lambda values: values["metric"].update(mode="up"), "mode max or min"),
        (lambda values: values.update(data=[]), "data must be a dict"),
    ],
)
def test_what_is_not_a_summary_is_refused_by_name(tmp_path: Path, damage: Any, seen: str) -> None:
    path = summary().save(tmp_path)
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match=seen):
        Summary.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ConfigurationError, match="not a summary"):
        Summary.load(tmp_path)
