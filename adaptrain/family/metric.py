"""Which of the metrics that a module logs ranks the members of a family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from adaptrain.errors import ConfigurationError
from adaptrain.policies.learning_rate.build import metric_mode

_BEFORE_LOSS = ("acc", "f1", "auroc", "auc", "mcc", "score", "perplexity")  # what a user means by a metric, first


def choose_metric(names: Iterable[str]) -> tuple[str, Literal["min", "max"]] | None:
    """Returns a metric and whether less (`"min"`) or more of it is better; None where no name tells.

    Args:
        names: What was logged. An accuracy goes before a loss, and else what was logged first.
    """
    known: list[tuple[int, str, Literal["min", "max"]]] = []
    for name in names:
        try:
            mode = metric_mode(name)
        except ConfigurationError:
            continue
        rank = next((i for i, word in enumerate(_BEFORE_LOSS) if word in name.lower()), len(_BEFORE_LOSS))
        known.append((rank, name, mode))
    if not known:
        return None
    _, name, mode = min(known, key=lambda entry: entry[0])
    return name, mode


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics that are numbers: JSON holds no others."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def is_better(new: float | None, old: float | None, mode: str) -> bool:
    """Whether one value of the metric is better than another; one that is not known, or nan, is worse than any."""
    new, old = (None if value is None or math.isnan(value) else value for value in (new, old))
    if new is None or old is None:
        return old is None and new is not None
    return new < old if mode == "min" else new > old
