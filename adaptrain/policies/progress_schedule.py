"""Learning-rate schedules over progress instead of a step count, so that a wall-clock budget ends annealed."""

from __future__ import annotations

import math
from collections.abc import Callable

from adaptrain.errors import ConfigurationError


def _constant(_: float) -> float:
    return 1.0


def _linear(spent: float) -> float:
    return 1.0 - spent


def _cosine(spent: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * spent))


_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _linear,  # over its decay alone
}


def progress_schedule(name: str, *, warmup: float = 0.05, decay: float = 0.2) -> Callable[[float], float]:
    """Returns a pure function from progress in [0, 1] to a learning-rate multiplier in [0, 1].

    After a linear warm-up from 0 to 1:

    * `"constant"`: stays at 1.
    * `"linear"`: falls in a straight line to 0 (linear-to-zero; Bergsma et al. 2025, arXiv:2502.15938).
    * `"cosine"`: half a cosine to 0 (Loshchilov & Hutter 2017, arXiv:1608.03983).
    * `"wsd"`: stays at 1, then falls linearly to 0 over the last `decay` (warmup-stable-decay; Hu et al. 2024,
      arXiv:2404.06395).

    Progress outside of [0, 1] counts as its nearest end.

    Args:
        name: The schedule.
        warmup: Share of the run for the warm-up, in [0, 1).
        decay: Share of the run for the decay of `"wsd"`, in (0, 1 - warmup].

    Raises:
        ConfigurationError: An unknown name, or a share out of its range.
    """
    if name not in _SHAPES:
        raise ConfigurationError(f"Unknown schedule {name!r}. Schedules are {', '.join(sorted(_SHAPES))}.")
    if not 0 <= warmup < 1:
        raise ConfigurationError(f"warmup is a share of the run and must be in [0, 1), got {warmup!r}.")
    if name == "wsd" and not 0 < decay <= 1 - warmup:
        raise ConfigurationError(
            f"decay is the share of the run spent annealing and must be in (0, {1 - warmup:g}] beside warmup={warmup},"
            f" got {decay!r}."
        )
    shape = _SHAPES[name]
    begin = 1 - decay if name == "wsd" else warmup

    def multiplier(progress: float) -> float:
        progress = min(1.0, max(0.0, progress))
        if progress < warmup:
            return progress / warmup
        if progress <= begin:
            return 1.0
        return max(0.0, shape((progress - begin) / (1 - begin)))

    return multiplier
