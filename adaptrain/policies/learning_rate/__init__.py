"""The factors of the learning-rate multiplier, each a pure policy, and their product."""

from __future__ import annotations

from adaptrain.policies.learning_rate.align import Align
from adaptrain.policies.learning_rate.batch import Batch
from adaptrain.policies.learning_rate.cap import Cap
from adaptrain.policies.learning_rate.guard import Guard, Verdict
from adaptrain.policies.learning_rate.journal import Journal
from adaptrain.policies.learning_rate.multiplier import NAMES, Multiplier, Signal
from adaptrain.policies.learning_rate.plateau import LossPlateau, MetricPlateau
from adaptrain.policies.learning_rate.recover import Recover

__all__ = [
    "NAMES",
    "Align",
    "Batch",
    "Cap",
    "Guard",
    "Journal",
    "LossPlateau",
    "MetricPlateau",
    "Multiplier",
    "Recover",
    "Signal",
    "Verdict",
]
