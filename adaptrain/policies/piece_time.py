"""What a micro-batch costs beside its tokens, from measured times."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from statistics import median
from typing import Any

_KEPT = 48


class PieceTimeFit:
    """Fits seconds = a + b x tokens to micro-batches: a is what each costs however small it is.

    By medians of the slopes between pairs (Theil 1950, Sen 1968), which a few hiccups of a shared machine do not move.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, float]] = []
        self._cost: float | None = None
        self._is_fresh = True

    def observe(self, tokens: int, seconds: float) -> None:
        """Adds a measured micro-batch; the last 48 count.

        Args:
            tokens: Samples times columns.
            seconds: From the start of its forward pass to the end of its backward pass.
        """
        self._seen = [*self._seen[1 - _KEPT :], (tokens, seconds)]
        self._is_fresh = False

    @property
    def piece_cost(self) -> float | None:
        """The constant a / b, in tokens; None before micro-batches of at least three sizes were measured."""
        if not self._is_fresh:
            self._cost = self._fit()
            self._is_fresh = True
        return self._cost

    def _fit(self) -> float | None:
        if len({tokens for tokens, _ in self._seen}) < 3:
            return None
        slope = median(
            (after - before) / (more - fewer)
            for (fewer, before), (more, after) in itertools.combinations(self._seen, 2)
            if more != fewer
        )
        if slope <= 0:
            return None
        return max(0.0, median(seconds - slope * tokens for tokens, seconds in self._seen) / slope)

    def clear(self) -> None:
        """Forgets every measurement."""
        self.__init__()

    def state_dict(self) -> dict[str, Any]:
        """Returns the measurements as plain Python."""
        return {"seen": [list(entry) for entry in self._seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the measurements of `state_dict`."""
        self._seen = [(int(tokens), float(seconds)) for tokens, seconds in state["seen"]]
        self._is_fresh = False
