"""From a user's switches to the factors that are on."""

from __future__ import annotations

import math
from typing import Any, Literal

from adaptrain.errors import ConfigurationError
from adaptrain.policies.learning_rate.align import Align
from adaptrain.policies.learning_rate.batch import Batch
from adaptrain.policies.learning_rate.cap import Cap
from adaptrain.policies.learning_rate.guard import Guard
from adaptrain.policies.learning_rate.multiplier import Multiplier
from adaptrain.policies.learning_rate.plateau import LossPlateau, MetricPlateau
from adaptrain.policies.learning_rate.recover import Recover

CHOICES: dict[str, tuple[object, ...]] = {
    "align": (True, False),
    "plateau": ("auto", True, False),
    "recover": (True, False),
    "guard": (True, False),
    "batch_scaling": ("auto", "sqrt", "linear", "adascale", None),
    "mode": ("auto", "min", "max"),
}
_LOWER_IS_BETTER = ("loss", "perplexity", "ppl", "nll", "error", "mse", "mae", "rmse", "wer", "cer")
_HIGHER_IS_BETTER = ("acc", "f1", "auc", "auroc", "precision", "recall", "bleu", "rouge", "mcc", "iou", "map", "score")


def check_switches(**values: object) -> None:
    """Raises `ConfigurationError` for a switch that is not one of its `CHOICES`."""
    for name, value in values.items():
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in CHOICES[name]):
            listed = ", ".join(repr(choice) for choice in CHOICES[name])
            raise ConfigurationError(f"LearningRateController: {name} must be one of {listed}; got {value!r}.")


def check_cap(cap: object) -> None:
    """Raises `ConfigurationError` for a cap that is neither a switch nor a number above 0."""
    if isinstance(cap, bool):
        return
    if not isinstance(cap, (int, float)) or not 0 < cap < math.inf:
        raise ConfigurationError(
            f"LearningRateController: cap must be True, False or the largest relative change in a step, a number above"
            f" 0; got {cap!r}."
        )


def metric_mode(monitor: str, *, callback: str = "LearningRateController") -> Literal["min", "max"]:
    """Tells by its name whether a lower or a higher value of a metric is better.

    Args:
        monitor: The metric's name.
        callback: Who asks, for the message.

    Raises:
        ConfigurationError: The name does not tell.
    """
    if any(word in monitor.lower() for word in _LOWER_IS_BETTER):
        return "min"
    if any(word in monitor.lower() for word in _HIGHER_IS_BETTER):
        return "max"
    raise ConfigurationError(
        f"{callback}: whether a lower {monitor!r} is better cannot be told by its name; give mode='min' or mode='max'."
    )


def build_multiplier(
    *,
    kind: Literal["adam", "momentum"] | None,
    own_rate: bool,
    align: bool,
    cap: bool | float,
    trained: bool,
    plateau: bool | Literal["auto"],
    recover: bool,
    guard: bool,
    batch_scaling: Any,
    metric: Literal["min", "max"] | None,
) -> Multiplier:
    """Returns the product of the factors that are on for an optimizer.

    Args:
        kind: Whether the optimizer's state shows Adam's moments, a momentum buffer, or neither: no align, no cap.
        own_rate: Whether it sets its own rate: the guard alone.
        align: The switch of the factor, as the others that bear a factor's name.
        cap: See `align`; a number is κ, which then never gives way.
        trained: Whether the weights were trained before.
        plateau: `"auto"`: judge only while the scheduler's rate stands still.
        recover: See `align`.
        guard: See `align`.
        batch_scaling: `"sqrt"`, `"linear"`, `"adascale"`, None, or `"auto"`: the root for Adam, else AdaScale's gain.
        metric: The better direction of a validation metric that plateau watches, or None for the training loss.
    """
    judge = Guard() if guard else None
    if own_rate:
        return Multiplier(guard=judge)
    if batch_scaling == "auto":
        batch_scaling = "sqrt" if kind == "adam" else "adascale"
    usual = {"kappa": Cap.TRAINED} if trained else {"kappa": Cap.FRESH, "room": Cap.ROOM}
    limit = usual if isinstance(cap, bool) else {"kappa": cap}
    watch = MetricPlateau(mode=metric) if metric is not None else LossPlateau(anneal=plateau is True)
    return Multiplier(
        align=Align(fresh=not trained) if align and kind else None,
        cap=Cap(**limit, annealed=1.0 if trained else Cap.ANNEALED) if cap and kind else None,
        plateau=watch if plateau else None,
        batch=Batch(scaling=batch_scaling),
        recover=Recover() if recover else None,
        guard=judge,
    )
