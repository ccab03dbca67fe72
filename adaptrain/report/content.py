"""What the report says, as text: the terminal and the page only arrange it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrain.decisions import Decision, read_decisions
from adaptrain.errors import ConfigurationError
from adaptrain.report.summary import Column, Constraint, Summary

MISSING = "—"
MET, NOT_MET = "✓", "✗"
MIB, GIB = 2**20, 2**30
REASONS_PER_KNOB = 3

_PERCENT = {"accuracy", "acc", "f1", "precision", "recall", "auroc"}
_BUDGET_LABELS = {
    "latency": "latency",
    "params": "parameters",
    "flops": "FLOPs",
    "memory": "inference memory",
    "latency_ms": "latency",
    "params_m": "parameters",
    "memory_gib": "training memory",
    "wall_clock_min": "training time",
}
_BUDGET_UNITS = {"latency_ms": " ms", "params_m": " M", "memory_gib": " GiB", "wall_clock_min": " min"}
_FRACTIONS = {"latency", "params", "flops", "memory"}
_KNOB_LABELS = {
    "structure": "structure (parameters)",
    "micro_batch_size": "micro-batch size",
    "global_batch_size": "global batch size",
    "learning_rate": "learning rate (multiplier)",
    "wall_clock": "wall clock (steps planned and taken)",
}


@dataclass(frozen=True)
class Row:
    """One line of the table of numbers: a label, the two models, and how they differ."""

    label: str
    dense: str
    final: str
    change: str


@dataclass(frozen=True)
class Limit:
    """One limit of the budget as text."""

    mark: str
    label: str
    value: str
    limit: str
    met: bool

    def __str__(self) -> str:
        verdict = "met" if self.met else "NOT met"
        return f"{self.mark} {self.label} {self.value} (limit {self.limit}): {verdict}"


@dataclass(frozen=True)
class KnobStory:
    """What one knob did: a headline and its most telling decisions, oldest first."""

    knob: str
    label: str
    headline: str
    telling: tuple[Decision, ...]
    untold: int


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, never in exponent form: `3.21`, `66.4`, `110`, `1234`, `0.0204`."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(decimals, 0)}f}"


def duration(seconds: float) -> str:
    """Seconds as `42.0 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def metric_text(name: str, value: float | None) -> str:
    """A metric as its readers write it: accuracy in percent, perplexity with two digits."""
    if value is None:
        return MISSING
    last = name.rpartition("/")[2]
    if last in _PERCENT:
        return f"{100 * value:.1f}%"
    return f"{value:.2f}" if last == "perplexity" else f"{value:.4f}"


def _metric_change(name: str, dense: float | None, final: float | None) -> str:
    if dense is None or final is None:
        return MISSING
    last = name.rpartition("/")[2]
    if last in _PERCENT:
        return f"{100 * (final - dense):+.1f} points"
    return f"{final - dense:+.2f}" if last == "perplexity" else f"{final - dense:+.4f}"


def _ratio(dense: float | None, final: float | None) -> str:
    return MISSING if not dense or final is None else f"{final / dense:.2f}x"


def _shape(column: Column) -> str:
    batch, length = column.latency_input
    return f"{batch} x {length} tokens"


def rows(summary: Summary) -> list[Row]:
    """The table of numbers. Without a dense column its cells and the changes are missing values."""
    dense, final = summary.dense, summary.final
    name = summary.metric["name"]
    split, _, short = name.rpartition("/")

    def metric_row(label: str, attribute: str) -> Row:
        before = getattr(dense, attribute) if dense else None
        after = getattr(final, attribute)
        change = _metric_change(name, before, after)
        return Row(label, metric_text(name, before), metric_text(name, after), change)

    def cost_row(label: str, attribute: str, text: Callable[[float], str]) -> Row:
        before = getattr(dense, attribute) if dense else None
        after = getattr(final, attribute)
        shown = [MISSING if value is None else text(value) for value in (before, after)]
        return Row(label, shown[0], shown[1], _ratio(before, after))

    return [
        metric_row(f"{short} ({split or 'val'})", "metric"),
        metric_row(f"{short} (test)", "test_metric"),
        cost_row("parameters", "params", lambda value: f"{significant(value / 1e6)} M"),
        cost_row(f"FLOPs ({_shape(final)})", "flops", lambda value: f"{significant(value / 1e9)} G"),
        cost_row(f"latency ({_shape(final)})", "latency_ms", lambda value: f"{significant(value)} ms"),
        cost_row("size on disk", "size_bytes", lambda value: f"{significant(value / MIB)} MiB"),
        cost_row("peak training memory", "peak_memory_bytes", lambda value: f"{significant(value / GIB)} GiB"),
        cost_row("training time", "train_time_s", duration),
    ]


def outcome(summary: Summary) -> str:
    """The run against its budget, in a few words."""
    if not summary.constraints:
        return "no budget set"
    missed = sum(not constraint.met for constraint in summary.constraints)
    if not missed:
        return "budget met"
    return f"budget NOT met ({missed} of {len(summary.constraints)} limits)"


def status_text(summary: Summary) -> str:
    """How the run ended, for a person."""
    return {"wall clock": "ended by the wall clock"}.get(summary.status, summary.status)


def limits(constraints: Iterable[Constraint]) -> list[Limit]:
    """The limits as text; where rounding would hide a breach, with as many digits as show it."""
    return [_limit(constraint) for constraint in constraints]


def _limit(constraint: Constraint) -> Limit:
    unit = "x" if constraint.name in _FRACTIONS else _BUDGET_UNITS.get(constraint.name, "")
    label = _BUDGET_LABELS.get(constraint.name, constraint.name)
    mark = MET if constraint.met else NOT_MET
    value, limit = _rounded(constraint, 2), f"{constraint.limit:.2f}"
    if not constraint.met:
        digits = next((n for n in range(2, 7) if _rounded(constraint, n) != f"{constraint.limit:.{n}f}"), 6)
        value, limit = _rounded(constraint, digits), f"{constraint.limit:.{digits}f}"
    return Limit(mark, label, value if value == MISSING else value + unit, limit + unit, constraint.met)


def _rounded(constraint: Constraint, digits: int) -> str:
    return MISSING if constraint.value is None else f"{constraint.value:.{digits}f}"


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def knob_value(knob: str, value: Any) -> str:
    """A knob's value as text: parameters in millions, a multiplier as `0.50x`."""
    if not is_number(value):
        return MISSING if value is None else str(value)
    if knob == "structure":
        return f"{significant(value / 1e6)} M"
    if knob == "learning_rate":
        return f"{significant(value)}x"
    return f"{value:g}" if isinstance(value, float) else str(value)


def change_text(decision: Decision) -> str:
    """Old and new value of one decision."""
    return f"{knob_value(decision.knob, decision.old)} → {knob_value(decision.knob, decision.new)}"


def knob_stories(decisions: Sequence[Decision]) -> list[KnobStory]:
    """One story per knob, in the order the knobs first moved."""
    by_knob: dict[str, list[Decision]] = {}
    for decision in decisions:
        by_knob.setdefault(decision.knob, []).append(decision)
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
    """The first decision, the largest of every other kind of reason, then the last and the largest of the rest.

    Reasons are of one kind when they differ in their numbers only.
    """
    largest = sorted(taken, key=_size, reverse=True)
    kinds = {re.sub(r"[\d.]+", "#", decision.reason): decision for decision in (*reversed(largest), taken[0])}
    by_size = sorted(kinds.values(), key=_size, reverse=True)
    chosen: list[Decision] = []
    for decision in (taken[0], *by_size, taken[-1], *largest):
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


def comparison_cells(summary: Summary) -> dict[str, str]:
    """The final model's numbers by label, for a table of several runs."""
    cells = {row.label: row.final for row in rows(summary)}
    met = sum(constraint.met for constraint in summary.constraints)
    cells["limits met"] = f"{met} of {len(summary.constraints)}" if summary.constraints else MISSING
    return cells
