"""Journal: which moves of the multiplier are worth a line in the record."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adaptrain.policies.learning_rate.factor import Factor

_WHY = {
    ("align", True): "the gradient still points the way the optimizer goes, so longer steps pay",
    ("align", False): "the raise gives way to the cap",
    ("cap", False): "a step would change the weights by more than the cap allows",
    ("cap", True): "the cap allows longer steps",
    ("plateau", False): "the loss stopped improving",
    ("plateau", True): "the plateau ended",
    ("batch", True): "the global batch grew",
    ("batch", False): "the global batch shrank",
    ("recover", True): "the model was pruned and recovers at a higher rate",
    ("recover", False): "the recovery after pruning runs out",
    ("guard", False): "training diverged",
    ("guard", True): "training has been calm since the fault",
}


class Journal(Factor):
    """Lets a move through when the multiplier has changed by a tenth since the last one, and not too often.

    Args:
        change: Relative change that is worth a record.
        gap: Least steps between two records of one factor; another factor's turn is let through after 5.
    """

    _state = ("values", "value", "step", "factor")

    def __init__(self, *, change: float = 0.1, gap: int = 20) -> None:
        self.change = math.log1p(change)
        self.gap = gap
        self.values: dict[str, float] = {}
        self.value = 1.0
        self.step = -gap
        self.factor = ""

    def observe(self, step: int, value: float, factors: Mapping[str, float]) -> tuple[float, str] | None:
        """Takes in the multiplier and its factors at a step.

        Returns:
            The last recorded multiplier and the reason for the move since, or None where there is nothing to record.
        """
        if abs(math.log(value / self.value)) < self.change or step - self.step < 5:
            return None
        moves = {name: math.log(new / self.values.get(name, 1.0)) for name, new in factors.items()}
        direction = math.copysign(1.0, value - self.value)
        factor = max(moves, key=lambda name: direction * moves[name])
        if factor == self.factor and step - self.step < self.gap:
            return None
        old, self.value, self.values, self.step, self.factor = self.value, value, dict(factors), step, factor
        return old, f"{factor}: {_WHY[factor, moves[factor] > 0]}"
