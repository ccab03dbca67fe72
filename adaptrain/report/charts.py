"""Which pictures a run has data for, and that data: nothing is drawn here."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adaptrain.decisions import Decision
from adaptrain.report.content import significant
from adaptrain.report.knobs import is_number

MAX_POINTS = 400  # more than a screen shows; keeps report.html small for a long run
_MEMORY = ("_rss_gib", "_allocated_gib", "_used_gib")  # what the run holds; not what is free, or the limit


@dataclass(frozen=True)
class Series:
    """One line: `values[i]` at optimizer step `steps[i]`; `"step"` holds each value until the next."""

    label: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    kind: Literal["line", "points", "step"] = "line"


@dataclass(frozen=True)
class Chart:
    """One picture over optimizer steps.

    Args:
        title: What it shows.
        unit: The unit of the vertical axis.
        series: Its lines, at least one.
        marks: Steps of structural events.
        limit: A limit of the budget in `unit`, or None.
        end: The last step of the run, where the horizontal axis ends.
        scale: The vertical axis: `"linear"`, `"zero"` (linear, from zero) or `"log"`.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    marks: tuple[int, ...] = ()
    limit: float | None = None
    end: float = 0.0
    scale: Literal["linear", "zero", "log"] = "linear"

    @property
    def description(self) -> str:
        """The picture in words, for those who do not see it."""
        parts = [
            f"{line.label}: {significant(line.values[0])} at step {line.steps[0]:.0f},"
            f" {significant(line.values[-1])} at step {line.steps[-1]:.0f}"
            for line in self.series
        ]
        if self.marks:
            parts.append(f"structural events at step {', '.join(map(str, self.marks))}")
        if self.limit is not None:
            parts.append(f"limit {significant(self.limit)}")
        return f"{self.title} ({self.unit}) over optimizer steps. {'; '.join(parts)}."


Metrics = dict[str, tuple[list[float], list[float]]]


def read_metrics(run_dir: str | Path) -> Metrics:
    """Reads `metrics.csv`: for each column its steps and values, empty and non-finite cells left out.

    A row cut short by a crash counts as far as it goes; a missing file is an empty result.
    """
    path = Path(run_dir) / "metrics.csv"
    metrics: Metrics = {}
    if not path.is_file():
        return metrics
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(line.replace("\0", "") for line in file):
            step = _number(row.pop("step", None))
            for name, cell in row.items():
                value = _number(cell) if isinstance(cell, str) else None
                if step is not None and value is not None:
                    steps, values = metrics.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
    return metrics


def charts(
    metrics: Metrics, decisions: Sequence[Decision], *, metric: str | None, memory_limit_gib: float | None
) -> list[Chart]:
    """The pictures there is data for.

    Args:
        metrics: From `read_metrics`.
        decisions: The run's decisions.
        metric: The validation metric; None picks the first `val/` column that is not the loss.
        memory_limit_gib: The limit on training memory, drawn beside it.
    """
    applied = [decision for decision in decisions if decision.applied]
    events = [decision for decision in applied if decision.knob == "structure"]
    marks = tuple(dict.fromkeys(decision.step for decision in events))
    last = max([0.0, *(steps[-1] for steps, _ in metrics.values()), *(float(d.step) for d in applied)])
    sizes = _knob_lines(applied, last)
    size_title = f"{sizes[0].label} size".capitalize() if len(sizes) == 1 else "Batch size"
    found = [
        Chart("Loss", "loss", _losses(metrics), marks, end=last),
        _metric_chart(metrics, metric, marks, last),
        Chart("Effective learning rate", "learning rate", _rates(metrics), marks, end=last, scale="log"),
        Chart(size_title, "samples", sizes, marks, end=last, scale="zero"),
        Chart("Cost of the model", "share of the dense model", _costs(events, last), end=last, scale="zero"),
        Chart("Memory", "GiB", _memory(metrics), marks, memory_limit_gib, end=last, scale="zero"),
    ]
    return [chart for chart in found if chart.series]


def _metric_chart(metrics: Metrics, metric: str | None, marks: tuple[int, ...], last: float) -> Chart:
    names = [metric] if metric else [name for name in sorted(metrics) if name.startswith("val/") and name != "val/loss"]
    name = names[0] if names else ""
    lines = (_line(metrics, name, kind="points"),) if name in metrics and name != "val/loss" else ()
    return Chart(name, name.rpartition("/")[2], lines, marks, end=last)


def _losses(metrics: Metrics) -> tuple[Series, ...]:
    training = next((name for name in ("train/loss_step", "train/loss", "train/loss_epoch") if name in metrics), None)
    lines = [_line(metrics, training, label="train/loss")] if training else []
    if "val/loss" in metrics:
        lines.append(_line(metrics, "val/loss", kind="points"))
    return tuple(lines)


def _rates(metrics: Metrics) -> tuple[Series, ...]:
    names = sorted(name for name in metrics if name.startswith("adaptrain/lr/"))
    positive = [_positive(_line(metrics, name, label=f"group {name.rpartition('/')[2]}")) for name in names]
    distinct = {line.values: line for line in reversed(positive) if line.values}
    return tuple(reversed(distinct.values()))


def _memory(metrics: Metrics) -> tuple[Series, ...]:
    names = sorted(name for name in metrics if name.startswith("adaptrain/") and name.endswith(_MEMORY))
    labels = [name.removeprefix("adaptrain/").removesuffix("_gib").replace("_", " ") for name in names]
    return tuple(_line(metrics, name, label=label) for name, label in zip(names, labels, strict=True))


def _knob_lines(applied: Sequence[Decision], last: float) -> tuple[Series, ...]:
    lines = []
    for knob, label in (("micro_batch_size", "micro-batch"), ("global_batch_size", "global batch")):
        taken = [d for d in applied if d.knob == knob and "stage" not in d.readings]  # evaluation has its own size
        points = [(d.step, d.old, d.new) for d in taken if is_number(d.new)]
        if points:
            steps, values = [float(step) for step, _, _ in points], [float(new) for _, _, new in points]
            if steps[0] > 0 and is_number(points[0][1]):
                steps, values = [0.0, *steps], [float(points[0][1]), *values]
            lines.append(_held(label, steps, values, last))
    return tuple(lines)


def _costs(events: Sequence[Decision], last: float) -> tuple[Series, ...]:
    """The model's costs after each event, as shares of the dense model's."""
    if not events or not events[0].old:
        return ()
    steps = [0.0, *(float(event.step) for event in events)]
    lines = [_held("parameters", steps, [1.0, *(event.new / events[0].old for event in events)], last)]
    for name, label in (("latency", "latency (estimated)"), ("flops", "FLOPs"), ("memory", "memory")):
        shares = [float(share) for event in events if is_number(share := event.readings.get(name))]
        if len(shares) == len(events):
            lines.append(_held(label, steps, [1.0, *shares], last))
    return tuple(lines)


def _held(label: str, steps: Sequence[float], values: Sequence[float], last: float) -> Series:
    return Series(label, (*steps, max(last, steps[-1])), (*values, values[-1]), "step")


def _line(
    metrics: Metrics, name: str, *, label: str | None = None, kind: Literal["line", "points", "step"] = "line"
) -> Series:
    steps, values = metrics[name]
    width = math.ceil(len(steps) / MAX_POINTS)
    if width > 1:  # means of `width` neighbours
        steps = [_mean(steps[i : i + width]) for i in range(0, len(steps), width)]
        values = [_mean(values[i : i + width]) for i in range(0, len(values), width)]
    return Series(label or name, tuple(steps), tuple(values), kind)


def _positive(line: Series) -> Series:
    """What a logarithmic axis can show."""
    kept = [(step, value) for step, value in zip(line.steps, line.values, strict=True) if value > 0]
    return Series(line.label, tuple(step for step, _ in kept), tuple(value for _, value in kept), line.kind)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _number(cell: str | None) -> float | None:
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
