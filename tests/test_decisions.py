from __future__ import annotations

import json
import math

import pytest

from adaptrain import Decision, DecisionLog
from adaptrain.decisions import read_decisions


def decision(step: int, **changes: object) -> Decision:
    fields: dict = {
        "knob": "learning_rate",
        "old": 1.0,
        "new": 0.5,
        "reason": "the loss rose",
        "readings": {"loss": 2.0},
    }
    return Decision(step=step, **(fields | changes))


def test_a_decision_survives_its_json_line():
    original = decision(7, readings={"loss": 2.5, "layers": [1, 2], "note": "ü\n<b>"}, applied=False, source="X")
    assert Decision.from_json(original.to_json()) == original


def test_non_finite_and_tensor_like_values_become_strict_json():
    class Scalar:
        def item(self) -> float:
            return 1.5

    line = decision(1, old=math.nan, new=math.inf, readings={"x": Scalar(), "path": object}).to_json()
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["old"] == "nan"
    assert read["new"] == "inf"
    assert read["readings"]["x"] == 1.5


def test_each_decision_is_on_disk_when_append_returns(tmp_path):
    log = DecisionLog(tmp_path / "new" / "decisions.jsonl")
    for step in range(3):
        log.append(decision(step))
        assert [d.step for d in read_decisions(tmp_path / "new" / "decisions.jsonl")] == list(range(step + 1))
    assert [d.step for d in log] == [0, 1, 2]


def test_a_new_run_keeps_the_older_file(tmp_path):
    path = tmp_path / "decisions.jsonl"
    for run in range(3):
        DecisionLog(path).append(decision(run))
    assert [d.step for d in read_decisions(path)] == [2]
    assert [d.step for d in read_decisions(tmp_path / "decisions.1.jsonl")] == [0]
    assert [d.step for d in read_decisions(tmp_path / "decisions.2.jsonl")] == [1]


def test_a_resumed_run_drops_what_it_will_decide_again(tmp_path):
    path = tmp_path / "decisions.jsonl"
    first = DecisionLog(path)
    for step in (1, 5, 9):
        first.append(decision(step))
    resumed = DecisionLog(path, resume_step=5)
    resumed.append(decision(8))
    assert [d.step for d in read_decisions(path)] == [1, 5, 8]
    assert len(resumed) == 3


def test_a_last_line_cut_by_a_crash_is_left_out_and_a_broken_one_before_it_is_not(tmp_path):
    path = tmp_path / "decisions.jsonl"
    whole = decision(1).to_json()
    path.write_text(whole + "\n" + whole[: len(whole) // 2])
    assert read_decisions(path) == [decision(1)]
    path.write_text(whole[:20] + "\n" + whole + "\n")
    with pytest.raises(ValueError, match="line 1 is not a decision"):
        read_decisions(path)
