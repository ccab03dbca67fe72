from __future__ import annotations

import pytest

from adaptrain import ConfigurationError
from adaptrain.family.metric import choose_metric, finite, is_better
from adaptrain.family.select import Candidate, select

FAMILY = [
    Candidate(name="dense", metric=0.90, latency_ms=100.0, memory_mib=40.0, params_m=20.0),
    Candidate(name="half", metric=0.91, latency_ms=50.0, memory_mib=30.0, params_m=15.0),
    Candidate(name="small", metric=0.80, latency_ms=20.0, memory_mib=20.0, params_m=10.0),
]


@pytest.mark.parametrize(
    ("limits", "chosen"),
    [
        ({}, "half"),
        ({"latency_ms": 49.9}, "small"),
        ({"latency_ms": 50.0}, "half"),
        ({"memory_mib": 25.0}, "small"),
        ({"params_m": 15.0, "metric_at_least": 0.91}, "half"),
    ],
)
def test_the_best_that_meets_every_limit(limits, chosen):
    assert select(FAMILY, limits) == chosen


def test_where_less_is_better():
    assert select(FAMILY, {}, mode="min") == "small"
    assert select(FAMILY, {"metric_at_least": 0.9, "params_m": 20}, mode="min") == "small"
    with pytest.raises(ConfigurationError, match=r"metric_at_least=0.7 .* is 0.8 \(member small\), 0.1 too much"):
        select(FAMILY, {"metric_at_least": 0.7}, metric="val/loss", mode="min")


def test_among_equals_the_fastest_and_without_a_metric_the_largest():
    equal = [Candidate(**{**vars(each), "metric": 0.5}) for each in FAMILY]
    assert select(equal, {}) == "small"
    unknown = [Candidate(**{**vars(each), "metric": None}) for each in FAMILY]
    assert select(unknown, {"latency_ms": 60}) == "half"
    with pytest.raises(ConfigurationError, match="no validation metric is known"):
        select(unknown, {"metric_at_least": 0.1})


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"latency_ms": 15}, r"latency_ms=15 cannot be met: the fastest, member small, takes 20 ms on this, 5 ms too"),
        ({"memory_mib": 15}, "member small, takes 20 MiB on this, 5 MiB too much"),
        ({"params_m": 9}, "the smallest, member small, takes 10 M parameters, 1 M parameters too much"),
        ({"metric_at_least": 0.95}, r"the best accuracy is 0.91 \(member half\), 0.04 short"),
        (
            {"latency_ms": 40, "metric_at_least": 0.9},
            r"Each of .* can be met on this, but no member meets all.*small, misses metric_at_least=0.9 \(accuracy 0.8,"
            " by 0.1",
        ),
    ],
)
def test_it_says_what_cannot_be_met_and_by_how_much(limits, said):
    with pytest.raises(ConfigurationError, match=said):
        select(FAMILY, limits, metric="accuracy", at=" on this")


def test_which_metric_ranks():
    assert choose_metric(["train/loss", "val/loss", "val/accuracy"]) == ("val/accuracy", "max")
    assert choose_metric(["val/loss", "val/perplexity"]) == ("val/perplexity", "min")
    assert choose_metric(["val/size", "val/loss"]) == ("val/loss", "min")
    assert choose_metric(["val/size"]) is None
    assert finite({"a": 1.0, "b": float("nan"), "c": float("inf")}) == {"a": 1.0}
    assert is_better(0.2, 0.1, "max")
    assert not is_better(0.2, 0.1, "min")
    assert is_better(0.2, None, "min")
    assert not is_better(None, 0.2, "max")
    assert is_better(0.2, float("nan"), "max")
    assert not is_better(float("nan"), 0.2, "min")
    assert not is_better(float("nan"), None, "min")
