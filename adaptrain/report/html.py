"""report.html: one page that needs no network and no script, of a finished run or of what there is of one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from adaptrain.decisions import Decision
from adaptrain.errors import ConfigurationError
from adaptrain.report import content, knobs, svg
from adaptrain.report.charts import Chart, charts, read_metrics
from adaptrain.report.style import STYLE
from adaptrain.report.summary import SUMMARY_FILE, Summary

PAGE_FILE = "report.html"
RUN_FILES = (SUMMARY_FILE, "decisions.jsonl", "metrics.csv")


def write_html(run_dir: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a run's folder, from its summary, decisions and metrics.

    A run without a summary (interrupted, still going, or not train.py's) gets a page that says so and shows what
    there is.

    Args:
        run_dir: The run's folder.

    Returns:
        The page's path.

    Raises:
        ConfigurationError: The folder holds nothing of a run, or a summary that cannot be read.
    """
    folder = Path(run_dir)
    check_run_folder(folder)
    summary = Summary.load(folder) if (folder / SUMMARY_FILE).is_file() else None
    page = folder / PAGE_FILE
    partial = page.with_suffix(".partial")
    partial.write_text(_page(folder, summary), encoding="utf-8")
    partial.replace(page)
    return page


def check_run_folder(run_dir: str | os.PathLike[str]) -> None:
    """Refuses a folder that holds nothing of a run.

    Raises:
        ConfigurationError: There is no such folder, or none of a run's files is in it.
    """
    folder = Path(run_dir)
    if not any((folder / name).is_file() for name in RUN_FILES):
        seen = f"it holds none of {', '.join(RUN_FILES)}" if folder.is_dir() else "there is no such folder"
        raise ConfigurationError(f"{folder} is no run: {seen}. Give a run's folder, such as runs/quickstart/<time>.")


def _page(folder: Path, summary: Summary | None) -> str:
    decisions = knobs.decisions_of(folder)
    limit = next((c.limit for c in summary.constraints if c.name == "memory_gib"), None) if summary else None
    metric = summary.metric["name"] if summary else None
    drawable = charts(read_metrics(folder), decisions, metric=metric, memory_limit_gib=limit)
    what = content.outcome(summary) if summary else content.without_summary(folder)[0]
    title = f"{summary.experiment if summary else folder.name}: {what}"
    body = [
        *(_outcome(summary) if summary else _without_summary(folder)),
        *(_numbers(summary) if summary else ()),
        *_knobs(decisions),
        *_pictures(drawable),
        *_all_decisions(decisions),
        *(_facts(summary) if summary else ()),
    ]
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en" xmlns="http://www.w3.org/1999/xhtml">',
            "<head>",
            '<meta charset="utf-8"/>',
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
            f"<title>{_text(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body><main>",
            *body,
            "</main></body>",
            "</html>",
            "",
        )
    )


def _outcome(summary: Summary) -> Iterable[str]:
    kind = "neutral" if not summary.constraints else "good" if summary.met else "bad"
    yield f"<h1>{_text(summary.experiment)}</h1>"
    yield f'<p class="lead"><span class="badge {kind}">{_text(content.outcome(summary))}</span>'
    status, started = content.status_text(summary), content.started_text(summary)
    how = f'<span class="bad">{_text(status)}</span>' if summary.status == content.DIVERGED else _text(status)
    yield f"{how}, seed {summary.seed}, started {_text(started)}</p>"
    if summary.constraints:
        yield '<ul class="limits">'
        for limit in content.limits(summary.constraints):
            kind = "good" if limit.met else "bad"
            yield f'<li><span class="{kind}">{_text(limit.mark)}</span> {_text(str(limit)[len(limit.mark) :])}</li>'
        yield "</ul>"


def _without_summary(folder: Path) -> Iterable[str]:
    word, why = content.without_summary(folder)
    yield f"<h1>{_text(folder.name)}</h1>"
    yield f'<p class="lead"><span class="badge neutral">{word}</span> {_text(why)}</p>'


def _numbers(summary: Summary) -> Iterable[str]:
    two = summary.dense is not None
    heads = ("dense", "final", "change") if two else ("final",)
    yield '<div class="scroll"><table class="numbers"><caption>The model in numbers</caption>'
    yield "<thead><tr><td></td>" + "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr></thead><tbody>"
    for row in content.rows(summary):
        cells = (row.dense, row.final, row.change) if two else (row.final,)
        yield f'<tr><th scope="row">{_text(row.label)}</th>' + "".join(f"<td>{_text(c)}</td>" for c in cells) + "</tr>"
    yield "</tbody></table></div>"
    if two:
        yield f'<p class="note">Dense column: {_text(summary.dense_source)}.</p>'


def _knobs(decisions: Sequence[Decision]) -> Iterable[str]:
    yield "<h2>What each knob did</h2>"
    stories = knobs.knob_stories(decisions)
    if not stories:
        yield "<p>No knob moved.</p>"
    for story in stories:
        yield f"<h3>{_text(story.label)}</h3><p>{_text(story.headline)}</p>"
        yield '<ol class="timeline">'
        for decision in story.telling:
            yield f'<li><span class="step">step {decision.step}</span>'
            yield f"<strong>{_text(knobs.change_text(decision))}</strong> {_text(decision.reason)}</li>"
        yield "</ol>"
        if story.untold:
            yield f'<p class="note">{story.untold} more below.</p>'


def _pictures(drawable: Sequence[Chart]) -> Iterable[str]:
    if not drawable:
        return
    yield "<h2>Over the steps</h2>"
    if not svg.can_draw():
        titles = ", ".join(chart.title for chart in drawable)
        yield f'<p class="note">Not drawn, because matplotlib is not installed: {_text(titles)}. To get them:'
        yield f"<code>{_text(svg.HOW_TO_GET)}</code>, then <code>python scripts/report.py</code> with this folder.</p>"
        return
    if any(chart.marks for chart in drawable):
        yield '<p class="note">Dashed vertical lines mark structural events.</p>'
    yield '<div class="pictures">'
    for number, chart in enumerate(drawable, start=1):
        picture = svg.draw(chart, name=f"picture-{number}")
        yield f"<figure><figcaption>{_text(chart.title)}</figcaption>{picture}</figure>"
    yield "</div>"


def _all_decisions(decisions: Sequence[Decision]) -> Iterable[str]:
    if not decisions:
        return
    yield f"<details><summary>All {len(decisions)} decisions</summary>"
    heads = ("step", "knob", "change", "reason", "readings", "by")
    yield '<div class="scroll" role="region" aria-label="All decisions" tabindex="0">'
    yield '<table class="decisions"><thead><tr>'
    yield "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr></thead><tbody>"
    for decision in decisions:
        by = decision.source if decision.applied else f"{decision.source} (dry run)"
        knob = decision.knob.replace("_", " ")
        cells = (str(decision.step), knob, knobs.change_text(decision), decision.reason)
        yield "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        yield f"<td>{_pairs(decision.readings)}</td><td>{_text(by)}</td></tr>"
    yield "</tbody></table></div></details>"


def _facts(summary: Summary) -> Iterable[str]:
    yield "<details><summary>How it was made</summary>"
    metric = summary.optimized_metric
    groups = {
        "Run": {"folder": summary.run_dir, "optimized metric": f"{metric.get('name')} = {metric.get('value')}"},
        "Data": summary.data,
        "Hardware": summary.hardware,
        "Versions": summary.versions,
    }
    for title, values in groups.items():
        yield f"<h3>{title}</h3>{_pairs(values)}"
    yield "</details>"


def _pairs(values: Mapping[str, Any]) -> str:
    if not values:
        return content.MISSING
    pairs = (f"<div><dt>{_text(key)}</dt><dd>{_text(_value(value))}</dd></div>" for key, value in values.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    return str(value)


def _text(text: object) -> str:
    """Escapes `text`; characters that no page may hold become spaces."""
    return escape("".join(char if char.isprintable() else " " for char in str(text)))
