"""The numbers of a run as text: the terminal and the page only arrange it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from adaptrain.report.summary import Column, Constraint, Summary

VERSIONS_FILE = "versions.json"  # of train.py's runs, from their start
MISSING = "—"
MET, NOT_MET = "✓", "✗"
DIVERGED = "diverged"  # a run's status
MIB, GIB = 2**20, 2**30

_PERCENT = {"accuracy", "acc", "f1", "precision", "recall", "auroc"}
_BUDGET_LABELS = {
    "latency": "latency",
    "params": "parameters",
    "flops": "FLOPs",
    "memory": "inference memory",
    "latency_ms": "latency",
    "params_m": "parameters",
    "trainable_params_m": "trainable parameters",
    "memory_gib": "training memory",
    "wall_clock_min": "training time",
}
_BUDGET_UNITS = {
    "latency_ms": " ms",
    "params_m": " M",
    "trainable_params_m": " M",
    "memory_gib": " GiB",
    "wall_clock_min": " min",
}
_FRACTIONS = {"latency", "params", "flops", "memory"}


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


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, never in exponent form: `3.21`, `66.4`, `110`, `1234`, `0.0204`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = abs(float(f"{value:.{digits}g}"))  # 9.999 is 10.0, not 10.00
    decimals = digits - 1 - math.floor(math.log10(rounded))
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
    known = {"wall clock": "ended by the wall clock", DIVERGED: "diverged (its loss is no number)"}
    return known.get(summary.status, summary.status)


def started_text(summary: Summary) -> str:
    """When the run started, to the minute."""
    try:
        return f"{datetime.fromisoformat(summary.started):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return summary.started


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


def comparison_cells(summary: Summary) -> dict[str, str]:
    """The final model's numbers by label, for a table of several runs."""
    cells = {row.label: row.final for row in rows(summary)}
    met = sum(constraint.met for constraint in summary.constraints)
    cells["limits met"] = f"{met} of {len(summary.constraints)}" if summary.constraints else MISSING
    return cells


def without_summary(folder: Path) -> tuple[str, str]:
    """Returns why a run has no summary, as a word and as a sentence: only train.py writes one, at the end."""
    if (folder / VERSIONS_FILE).is_file():
        return "unfinished", "This run was interrupted or is still going: it has no summary yet."
    return "decisions", "This run is not train.py's, which alone writes a summary: here is what its callbacks decided."
