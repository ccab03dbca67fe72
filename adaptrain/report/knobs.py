"""What each knob did, as text: a headline and the few decisions that tell the most."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from adaptrain.decisions import Decision, read_decisions
from adaptrain.errors import ConfigurationError
from adaptrain.report.content import MISSING, significant

REASONS_PER_KNOB = 3

_KNOB_LABELS = {
    "structure": "structure (parameters)",
    "weight_sparsity": "weights set to zero (share)",
    "micro_batch_size": "micro-batch size",
    "global_batch_size": "global batch size",
    "learning_rate": "learning rate (multiplier)",
    "distillation": "distillation (the teacher's share of the loss)",
    "elastic": "elastic (networks that train)",
    "family": "family (members kept)",
    "fake_quantization": "rounding in training",
    "precision": "precision of the copy that is left",
    "recovery": "recovery (a member's metric)",
    "trainable_params": "trainable parameters",
    "wall_clock": "wall clock (steps planned and taken)",
}


@dataclass(frozen=True)
class KnobStory:
    """What one knob did: a headline and its most telling decisions, oldest first."""

    knob: str
    label: str
    headline: str
    telling: tuple[Decision, ...]
    untold: int


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def knob_value(knob: str, value: Any) -> str:
    """A knob's value as text: parameters in millions, a multiplier as `0.50x`, zeros in percent."""
    if not is_number(value):
        return MISSING if value is None else str(value)
    if knob in ("structure", "trainable_params"):
        return f"{significant(value / 1e6)} M"
    if knob == "weight_sparsity":
        return f"{value:.0%}"
    if knob == "learning_rate":
        return f"{significant(value)}x"
    return f"{value:g}" if isinstance(value, float) else str(value)


def change_text(decision: Decision) -> str:
    """Old and new value of one decision."""
    return f"{knob_value(decision.knob, decision.old)} → {knob_value(decision.knob, decision.new)}"


def knob_stories(decisions: Sequence[Decision]) -> list[KnobStory]:
    """One story per knob, in the order the knobs first moved; a stage of evaluation has its own."""
    by_knob: dict[str, list[Decision]] = {}
    for decision in decisions:
        stage = decision.readings.get("stage")
        by_knob.setdefault(f"{decision.knob} in {stage}" if stage else decision.knob, []).append(decision)
    return [_story(knob, taken) for knob, taken in by_knob.items()]


def _story(knob: str, taken: list[Decision]) -> KnobStory:
    applied = [decision for decision in taken if decision.applied]
    shown = applied or taken
    headline = f"{len(shown)} decision{'' if len(shown) == 1 else 's'}, {_path(knob, shown)}"
    if not applied:
        headline = f"dry run, nothing changed: {headline}"
    elif len(applied) < len(taken):
        headline += f" (and {len(taken) - len(applied)} only recorded, dry run)"
    telling = _telling(shown)
    return KnobStory(knob, _KNOB_LABELS.get(knob, knob.replace("_", " ")), headline, telling, len(taken) - len(telling))


def _path(knob: str, taken: Sequence[Decision]) -> str:
    """First and last value, and how far the knob went beyond them in between."""
    first, last = taken[0].old, taken[-1].old if _skips(taken[-1]) else taken[-1].new
    path = f"{knob_value(knob, first)} → {knob_value(knob, last)}"
    numbers = [value for d in taken if not _skips(d) for value in (d.old, d.new)]
    if not numbers or not all(map(is_number, numbers)):
        return path
    beyond = [("lowest", min(numbers), min(first, last)), ("highest", max(numbers), max(first, last))]
    further = [f"{word} {knob_value(knob, value)}" for word, value, end in beyond if value != end]
    return f"{path} ({', '.join(further)})" if further else path


def _telling(taken: list[Decision]) -> tuple[Decision, ...]:
    """The first and the last decision, the largest of every other kind of reason, then the largest of the rest.

    Reasons are of one kind when they differ in their numbers only.
    """
    largest = sorted(taken, key=_size, reverse=True)
    kinds = {
        re.sub(r"[\d.]+", "#", decision.reason): decision for decision in (*reversed(largest), taken[-1], taken[0])
    }
    by_size = sorted(kinds.values(), key=_size, reverse=True)
    chosen: list[Decision] = []
    for decision in (taken[0], taken[-1], *by_size, *largest):
        if len(chosen) < REASONS_PER_KNOB and not any(decision is other for other in chosen):
            chosen.append(decision)
    positions = {id(decision): index for index, decision in enumerate(taken)}
    return tuple(sorted(chosen, key=lambda decision: positions[id(decision)]))


def _size(decision: Decision) -> float:
    """How large a change is: the ratio of new to old, either way; from or to zero is the largest."""
    try:
        return abs(math.log(decision.new / decision.old))
    except (ValueError, ZeroDivisionError):
        return math.inf
    except TypeError:
        return 0.0


def _skips(decision: Decision) -> bool:
    """Whether a learning-rate decision skips its one step and leaves the multiplier as it was."""
    return decision.knob == "learning_rate" and decision.new == 0


def decisions_of(run_dir: str | Path) -> list[Decision]:
    """The decisions of a run; empty where it took none.

    Raises:
        ConfigurationError: Its `decisions.jsonl` holds something else.
    """
    path = Path(run_dir) / "decisions.jsonl"
    try:
        return read_decisions(path) if path.is_file() else []
    except ValueError as error:
        raise ConfigurationError(f"{error}. Take the line out of the file, or move the file away.") from error
