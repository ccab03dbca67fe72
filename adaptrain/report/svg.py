"""Draws a chart as SVG to stand inside a page, its colours taken from the page's own style."""

from __future__ import annotations

import io
import re
from html import escape
from importlib.util import find_spec
from typing import Any

from adaptrain.report.charts import Chart

HOW_TO_GET = 'pip install "adaptrain[report]"'
# Colours that stand for the page's; each is drawn and then replaced, so that the picture follows light and dark.
_INK, _FAINT, _LIMIT = "#010101", "#020202", "#030303"
_SERIES = ("#040404", "#050505", "#060606", "#070707")
_PAGE_COLOURS = {_INK: "var(--ink)", _FAINT: "var(--faint)", _LIMIT: "var(--bad)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)
}


def can_draw() -> bool:
    """Whether matplotlib, the extra `report`, is installed."""
    return find_spec("matplotlib") is not None


def draw(chart: Chart, *, name: str) -> str:
    """Returns the chart as an `<svg>` element with a title and a description.

    Args:
        chart: What to draw.
        name: A prefix that makes the element's ids unique in the page.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.linewidth": 0.6}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for step in chart.marks:
            axes.axvline(step, color=_FAINT, linewidth=1, linestyle=(0, (2, 2)))
        if chart.limit is not None:
            axes.axhline(chart.limit, color=_LIMIT, linewidth=1.2, linestyle=(0, (5, 2)), label="limit")
        for number, line in enumerate(chart.series):
            axes.plot(
                line.steps,
                line.values,
                color=_SERIES[number % len(_SERIES)],
                # a second sign beside the colour, for those who do not tell colours apart
                linestyle=("-", "--", ":", "-.")[number % 4] if line.kind != "points" else "-",
                linewidth=1.4,
                marker="o" if line.kind == "points" or len(line.steps) == 1 else None,
                markersize=3.5,
                drawstyle="steps-post" if line.kind == "step" else "default",
                label=line.label,
            )
        if chart.scale == "log":
            axes.set_yscale("log")
        elif chart.scale == "zero":
            axes.set_ylim(bottom=0)
            if all(value.is_integer() for line in chart.series for value in line.values):
                axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0, max(chart.end, 1) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimizer step", color=_INK)
        axes.set_ylabel(chart.unit, color=_INK)
        axes.tick_params(which="both", colors=_INK)
        axes.grid(axis="y", color=_FAINT, alpha=0.35, linewidth=0.6)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_FAINT)
        if len(chart.series) > 1 or chart.limit is not None:
            axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), chart, name)


def _inline(document: str, chart: Chart, name: str) -> str:
    """The `<svg>` element of a document, named, with unique ids, its size left to the page."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, page_colour in _PAGE_COLOURS.items():
        svg = svg.replace(colour, page_colour)
    head, _, rest = svg.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return (
        f'{head} role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(chart.title)}</title>'
        f'<desc id="{name}-desc">{escape(chart.description)}</desc>{rest}'
    )
