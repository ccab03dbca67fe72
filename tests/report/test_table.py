from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adaptrain.report import Constraint, print_report, render_comparison, render_knobs, render_table
from tests.report.samples import DECISIONS, decision, plain_summary, run_folder, summary


def printed(renderable: Any, *, width: int = 80, encoding: str = "utf-8", **settings: Any) -> str:
    """What a person sees in a terminal of this width and encoding."""
    sink = io.BytesIO()
    stream = io.TextIOWrapper(sink, encoding=encoding, errors="strict", newline="\n")
    Console(file=stream, width=width, **settings).print(renderable)
    stream.flush()
    return sink.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_says_it_all(width: int) -> None:
    text = printed(render_table(summary(), decisions=DECISIONS), width=width)
    assert all(len(line) <= width for line in text.splitlines())
    flat = " ".join(text.split())
    for said in (
        "quickstart: finished, budget met",
        "✓ latency 0.49x (limit 0.50x): met",
        "dense final change",
        "accuracy (val) 61.2% 88.1% +26.9 points",
        "Dense column: the dense model as measured at step 120, before the first structural event.",
        "structure (parameters): 2 decisions, 3.21 M → 1.43 M",
        "step 120 3.21 M → 2.00 M event 1 of 2: removed 4 heads",
        "run: runs/quickstart/one",
    ):
        assert said in flat


def test_one_column_without_a_dense_model() -> None:
    text = printed(render_table(plain_summary(), decisions=[]))
    assert "final" in text
    assert "dense" not in text.lower()
    assert "change" not in text
    assert "no budget set" in text
    assert "No knob moved." in text


def test_a_missed_limit_is_said_without_colour() -> None:
    missed = Constraint(name="latency", limit=0.5, value=0.61, met=False)
    text = printed(render_table(summary(constraints=(missed,)), decisions=[]), no_color=True)
    assert "\x1b" not in text
    assert "budget NOT met (1 of 1 limits)" in text
    assert "✗ latency 0.61x (limit 0.50x): NOT met" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_stdout_that_is_not_utf8_loses_no_fact(encoding: str) -> None:
    exotic = decision(9, "learning_rate", 1.0, 2.0, "κ grew \u00d7 2 → 模型")
    text = printed(render_table(summary(), decisions=[*DECISIONS, exotic]), encoding=encoding)
    assert "ok latency 0.49x (limit 0.50x): met" in text
    assert "64 -> 32" in text
    assert re.search(r"grew x 2 -> \?\?", text)


def test_a_long_reason_wraps_beside_its_step() -> None:
    long = "because " + " ".join(f"word{i}" for i in range(60))
    lines = printed(render_knobs([decision(7, "structure", 10**6, 10**5, long)])).splitlines()
    first = next(i for i, line in enumerate(lines) if "because" in line)
    column = lines[first].index("because")
    assert len(lines) > first + 4
    assert all(line[:column].strip() == "" for line in lines[first + 1 :])
    assert " ".join(" ".join(lines).split()).endswith("word58 word59")


def test_a_reason_is_neither_markup_nor_terminal_control() -> None:
    text = printed(render_knobs([decision(7, "structure", 2, 1, "[red]x[/nope] \x1b[2J\rend")]), force_terminal=True)
    assert "[red]x[/nope]" in text
    assert "\x1b[2J" not in text
    assert "\r" not in text


def test_decisions_are_read_from_the_run_unless_given(tmp_path: Path) -> None:
    run_folder(tmp_path, summary=summary())
    text = printed(render_table(summary(run_dir=str(tmp_path))))
    assert "micro-batch size: 2 decisions" in text


def test_runs_side_by_side_in_as_many_tables_as_the_width_needs() -> None:
    runs = [summary(run_dir=f"runs/{i}") for i in range(6)]
    runs[2] = plain_summary(run_dir="runs/2", metric={"name": "val/perplexity", "mode": "min"})
    text = printed(render_comparison(runs))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("latency (32 x 128 tokens)") == 2
    assert all(f"run {i + 1}: runs/{i} (quickstart, seed 1)" in text for i in range(6))
    accuracy, perplexity = (next(line for line in text.splitlines() if key in line) for key in ("accuracy", "perplex"))
    assert accuracy.split()[2:5] == ["88.1%", "88.1%", "—"]
    assert perplexity.split()[2:5] == ["—", "—", "0.88"]


def test_a_stdout_that_is_no_terminal_gets_a_known_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    reason = decision(7, "structure", 10**6, 10**5, "word " * 60)
    print_report(render_knobs([reason]))
    assert 90 < max(map(len, capsys.readouterr().out.splitlines())) <= 100
    monkeypatch.setenv("COLUMNS", "60")
    print_report(render_knobs([reason]))
    assert 50 < max(map(len, capsys.readouterr().out.splitlines())) <= 60
