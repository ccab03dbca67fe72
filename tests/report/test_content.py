from __future__ import annotations

import math
from dataclasses import replace

import pytest

from adaptrain.report import Constraint, content
from tests.report.samples import DENSE, FINAL, plain_summary, summary


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.2119, "3.21"),
        (66.44, "66.4"),
        (110.2, "110"),
        (1234.4, "1234"),
        (0.02044, "0.0204"),
        (9.999, "10.0"),
        (0, "0"),
        (math.inf, "inf"),
    ],
)
def test_significant_digits(value: float, text: str) -> None:
    assert content.significant(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (59.99, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (3599.7, "1 h 00 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert content.duration(seconds) == text


def test_the_table_of_a_pruned_run() -> None:
    assert [(row.label, row.dense, row.final, row.change) for row in content.rows(summary())] == [
        ("accuracy (val)", "61.2%", "88.1%", "+26.9 points"),
        ("accuracy (test)", "—", "87.1%", "—"),
        ("parameters", "3.21 M", "1.43 M", "0.45x"),
        ("FLOPs (32 x 128 tokens)", "8.12 G", "3.92 G", "0.48x"),
        ("latency (32 x 128 tokens)", "21.3 ms", "10.4 ms", "0.49x"),
        ("size on disk", "12.3 MiB", "5.58 MiB", "0.46x"),
        ("peak training memory", "—", "3.60 GiB", "—"),
        ("training time", "—", "2 min 43 s", "—"),
    ]


def test_perplexity_is_plain_and_loss_has_more_digits() -> None:
    metrics = {"dense": replace(DENSE, metric=31.236), "final": replace(FINAL, metric=24.5, test_metric=None)}
    row = content.rows(summary(metric={"name": "val/perplexity", "mode": "min"}, **metrics))[0]
    assert (row.label, row.dense, row.final, row.change) == ("perplexity (val)", "31.24", "24.50", "-6.74")
    row = content.rows(summary(metric={"name": "val/loss", "mode": "min"}))[0]
    assert (row.final, row.change) == ("0.8812", "+0.2692")


def test_what_was_not_measured_is_a_dash_never_a_zero() -> None:
    bare = replace(FINAL, flops=None, latency_ms=None, size_bytes=None, metric=None, peak_memory_bytes=None)
    finals = {row.label: row.final for row in content.rows(plain_summary(final=bare))}
    assert finals["FLOPs (32 x 128 tokens)"] == finals["size on disk"] == finals["accuracy (val)"] == "—"
    assert {row.dense for row in content.rows(plain_summary())} == {"—"}


def test_the_outcome_counts_the_limits() -> None:
    missed = Constraint(name="params_m", limit=1.0, value=1.43, met=False)
    assert content.outcome(plain_summary()) == "no budget set"
    assert content.outcome(summary()) == "budget met"
    assert content.outcome(summary(constraints=(*summary().constraints, missed))) == "budget NOT met (1 of 3 limits)"


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (Constraint(name="latency", limit=0.5, value=0.4878, met=True), "✓ latency 0.49x (limit 0.50x): met"),
        (Constraint(name="latency", limit=0.5, value=0.5021, met=False), "✗ latency 0.502x (limit 0.500x): NOT met"),
        (Constraint(name="latency_ms", limit=9, value=12.5, met=False), "✗ latency 12.50 ms (limit 9.00 ms): NOT met"),
        (
            Constraint(name="memory_gib", limit=4, value=None, met=False),
            "✗ training memory — (limit 4.00 GiB): NOT met",
        ),
        (Constraint(name="own", limit=4, value=3, met=True), "✓ own 3.00 (limit 4.00): met"),
    ],
)
def test_a_limit_shows_what_decides_it(constraint: Constraint, text: str) -> None:
    assert str(content.limits([constraint])[0]) == text
