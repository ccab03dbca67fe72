from __future__ import annotations

from adaptrain.report import knobs
from tests.report.samples import DECISIONS, decision


def test_each_knob_has_its_story() -> None:
    stories = {story.knob: story for story in knobs.knob_stories(DECISIONS)}
    assert list(stories) == ["micro_batch_size", "structure", "learning_rate"]
    assert stories["micro_batch_size"].headline == "2 decisions, 64 → 64 (lowest 32)"
    assert stories["structure"].headline == "2 decisions, 3.21 M → 1.43 M"
    assert stories["learning_rate"].headline == "1 decision, 1.00x → 0.400x"
    assert [item.step for item in stories["structure"].telling] == [120, 200]


def test_a_stage_of_evaluation_has_its_own_story() -> None:
    stage = decision(250, "micro_batch_size", 64, 4, "ran out in validation", readings={"stage": "validation"})
    stories = {story.label: story.headline for story in knobs.knob_stories([*DECISIONS, stage])}
    assert stories["micro-batch size"] == "2 decisions, 64 → 64 (lowest 32)"
    assert stories["micro batch size in validation"] == "1 decision, 64 → 4"


def test_many_decisions_are_told_by_the_first_and_the_largest_of_each_kind() -> None:
    climb = [decision(i, "learning_rate", 1.05**i, 1.05 ** (i + 1), f"cosine 0.{i:02d}: higher") for i in range(20)]
    fall = decision(20, "learning_rate", 2.6, 0.5, "the loss rose for 3 windows")
    rise = decision(21, "learning_rate", 0.5, 0.6, "cosine 0.11: higher")
    story = knobs.knob_stories([*climb, fall, rise])[0]
    assert [item.step for item in story.telling] == [0, 20, 21]
    assert story.untold == 19


def test_dry_run_decisions_are_marked_and_not_counted_as_done() -> None:
    watched = [decision(5, "structure", 100, 50, "would remove half", applied=False)]
    assert knobs.knob_stories(watched)[0].headline.startswith("dry run, nothing changed: 1 decision")
    mixed = [*watched, decision(6, "structure", 2_000_000, 1_000_000, "removed half")]
    story = knobs.knob_stories(mixed)[0]
    assert story.headline == "1 decision, 2.00 M → 1.00 M (and 1 only recorded, dry run)"
    assert [item.step for item in story.telling] == [6]


def test_values_that_are_no_numbers_stay_as_they_are() -> None:
    odd = decision(0, "micro_batch_size", "auto", 32, "found by probing")
    assert knobs.change_text(odd) == "auto → 32"
    assert knobs.change_text(decision(0, "freezing", None, True, "")) == "— → True"
    assert knobs.knob_stories([odd])[0].headline == "1 decision, auto → 32"


def test_a_skipped_step_is_told_but_does_not_count_as_the_last_value() -> None:
    raised = decision(10, "learning_rate", 1.0, 1.5, "align: longer steps pay")
    skipped = decision(20, "learning_rate", 1.5, 0.0, "guard: the loss is a spike; the step is skipped")
    story = knobs.knob_stories([raised, skipped])[0]
    assert story.headline == "2 decisions, 1.00x → 1.50x"
    assert [item.step for item in story.telling] == [10, 20]
    assert knobs.knob_stories([skipped])[0].headline == "1 decision, 1.50x → 1.50x"
