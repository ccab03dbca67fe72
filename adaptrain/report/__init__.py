"""The report of a run: `summary.json`, a terminal table, and `report.html`."""

from __future__ import annotations

from adaptrain.report.html import write_html
from adaptrain.report.measure import load_baseline, summarize
from adaptrain.report.summary import Column, Constraint, Summary
from adaptrain.report.table import print_report, render_comparison, render_knobs, render_table

__all__ = [
    "Column",
    "Constraint",
    "Summary",
    "load_baseline",
    "print_report",
    "render_comparison",
    "render_knobs",
    "render_table",
    "summarize",
    "write_html",
]
