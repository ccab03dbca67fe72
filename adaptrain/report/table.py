"""The report in a terminal: read in ten seconds, with or without colour, in 80 columns or more."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from adaptrain.decisions import Decision
from adaptrain.report import content, knobs
from adaptrain.report.summary import Summary

MAX_WIDTH = 100
RUN_COLUMN_WIDTH = 13
_ASCII = {"✓": "ok", "✗": "!!", "—": "-", "→": "->", "…": "...", "\u00d7": "x", "±": "+/-", "≤": "<=", "≥": ">="}


def render_table(summary: Summary, *, decisions: Sequence[Decision] | None = None) -> Any:
    """Returns a rich renderable: outcome, numbers of dense and final model, what each knob did, where the run lies.

    Args:
        summary: The run's summary.
        decisions: The run's decisions; None reads `decisions.jsonl` in the run's folder.
    """
    taken = knobs.decisions_of(summary.run_dir) if decisions is None else decisions
    return _Report(summary, taken)


def render_knobs(decisions: Sequence[Decision]) -> Any:
    """Returns a rich renderable of what each knob did, for a run that has no summary yet."""
    return _Plain(lambda words: list(_knobs(decisions, words)))


def render_comparison(summaries: Sequence[Summary]) -> Any:
    """Returns a rich renderable of several runs side by side: their final models and their outcome."""
    return _Comparison(summaries)


def print_report(renderable: Any) -> None:
    """Prints a renderable of this module to stdout, at most `MAX_WIDTH` columns wide.

    A stdout that is no terminal gets 100 columns unless `COLUMNS` says otherwise.
    """
    console = Console()
    known = console.is_terminal or "COLUMNS" in os.environ
    console.width = min(console.width, MAX_WIDTH) if known else MAX_WIDTH
    console.print(renderable)


class _Words:
    """Text for one console: what its encoding cannot say is replaced, and nothing in it is read as markup."""

    def __init__(self, options: ConsoleOptions) -> None:
        self._encoding = options.encoding if options.ascii_only else None

    def __call__(self, text: str, style: str = "") -> Text:
        text = "".join(char if char.isprintable() else " " for char in text)
        if self._encoding is not None:
            text = "".join(_ASCII.get(char, char) for char in text)
            text = text.encode(self._encoding, "replace").decode(self._encoding)
        return Text(text, style=style)


class _Plain:
    """Builds its parts when printed, once the console's encoding is known."""

    def __init__(self, parts: Any) -> None:
        self._parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield Group(*self._parts(_Words(options)))


class _Report:
    def __init__(self, summary: Summary, decisions: Sequence[Decision]) -> None:
        self.summary = summary
        self.decisions = decisions

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        words, summary = _Words(options), self.summary
        style = "bold green" if summary.met else "bold red"
        diverged = " red" if summary.status == content.DIVERGED else ""
        title = words(f"{summary.experiment}: {content.status_text(summary)}, ", f"bold{diverged}")
        yield title + words(content.outcome(summary), style if summary.constraints else "")
        for limit in content.limits(summary.constraints):
            yield Padding(words(str(limit), "green" if limit.met else "bold red"), (0, 0, 0, 2), expand=False)
        yield _numbers(summary, words)
        if summary.dense is not None:
            yield words(f"Dense column: {summary.dense_source}.", "dim")
        yield Text()
        yield from _knobs(self.decisions, words)
        yield Text()
        yield words(f"run: {summary.run_dir}")


def _numbers(summary: Summary, words: _Words) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    for name in ("dense", "final", "change") if summary.dense is not None else ("final",):
        table.add_column(name, justify="right")
    for row in content.rows(summary):
        cells = [row.dense, row.final, row.change] if summary.dense is not None else [row.final]
        table.add_row(words(row.label), *(words(cell) for cell in cells))
    return table


def _knobs(decisions: Sequence[Decision], words: _Words) -> Iterator[Any]:
    stories = knobs.knob_stories(decisions)
    yield words("What each knob did", "bold")
    if not stories:
        yield Padding(words("No knob moved."), (0, 0, 0, 2), expand=False)
    for story in stories:
        yield Padding(words(f"{story.label}: {story.headline}"), (0, 0, 0, 2), expand=False)
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.add_column(no_wrap=True)
        lines.add_column(no_wrap=True)
        lines.add_column()
        for decision in story.telling:
            change = words(knobs.change_text(decision))
            lines.add_row(words(f"step {decision.step}", "dim"), change, words(decision.reason))
        yield Padding(lines, (0, 0, 0, 4), expand=False)


class _Comparison:
    def __init__(self, summaries: Sequence[Summary]) -> None:
        self.summaries = summaries

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        words = _Words(options)
        cells = [content.comparison_cells(summary) for summary in self.summaries]
        labels = list(dict.fromkeys(label for column in cells for label in column))
        room = max(1, (options.max_width - max(map(len, labels)) - 2) // RUN_COLUMN_WIDTH)
        yield words("Final models side by side (each run measured its own latency)", "bold")
        for start in range(0, len(cells), room):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            table.add_column()
            for number in range(start, min(start + room, len(cells))):
                table.add_column(f"run {number + 1}", justify="right")
            for label in labels:
                picked = [column.get(label, content.MISSING) for column in cells[start : start + room]]
                table.add_row(words(label), *(words(cell) for cell in picked))
            yield table
        for number, summary in enumerate(self.summaries, start=1):
            yield words(f"run {number}: {summary.run_dir} ({summary.experiment}, seed {summary.seed})")
