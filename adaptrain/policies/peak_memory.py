"""Predicting the memory a step takes from what steps before it took."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

_KEPT = 64
_MORE = 1.1  # this much more room than where a step ran out, before it is tried again


class PeakMemoryFit:
    """Fits added memory ≈ a + b·B·L + c·B·L² to measured steps of B samples, each L columns long.

    Added is the peak of a step over what was in use before it: what was in use (weights, optimizer state, data, and
    anything else in the process) may change between steps, and is to be added as it is then. `a` is what every step
    adds (gradients), `b` the activations, `c` attention. The coefficients are at least zero, and the fit is raised by
    its largest shortfall, so that no step that was measured would have been predicted too low.
    """

    def __init__(self) -> None:
        self._added: dict[tuple[int, int], float] = {}
        self._exceeded: dict[tuple[int, int], float] = {}
        self._fits: list[tuple[list[float], float]] | None = None  # coefficients and shift, until the next measurement

    def observe(self, samples: int, length: int, *, added_bytes: float) -> None:
        """Adds a measured step.

        Args:
            samples: Samples at once.
            length: Columns of each; 1 where there are no sequences.
            added_bytes: The peak during the step less what was in use before it.
        """
        shape = samples, length
        self._fits = None
        self._added[shape] = max(added_bytes, self._added.get(shape, 0.0))
        if len(self._added) > _KEPT:
            # The largest shapes say most about a larger one: the smallest goes.
            del self._added[min(self._added, key=lambda shape: shape[0] * shape[1])]

    def exceeded(self, samples: int, length: int, *, room_bytes: float) -> None:
        """Adds a step that ran out of memory: it and larger ones do not fit until there is more room than then.

        Args:
            samples: Samples at once.
            length: Columns of each.
            room_bytes: What the step was allowed to add.
        """
        self._exceeded[samples, length] = room_bytes
        if len(self._exceeded) > _KEPT:
            del self._exceeded[next(iter(self._exceeded))]

    @property
    def measured(self) -> int:
        """How many shapes were measured."""
        return len(self._added)

    def knows(self, samples: int, length: int) -> bool:
        """Whether a step was measured that takes at least as much, whichever of the terms makes it up."""
        terms = _terms(samples, length)
        return any(all(map(operator.le, terms, _terms(*shape))) for shape in self._added)

    def predict(self, samples: int, length: int, *, unseen: float = 1.0) -> float | None:
        """Returns the bytes a step is expected to add, or None before anything was measured.

        Args:
            samples: Samples at once.
            length: Columns of each.
            unseen: How many times the fit's answer a step is expected to add that none measured was as large as.
        """
        if not self._added:
            return None
        if self._fits is None:
            self._fits = self._fit()
        added = max(_dot(coefficients, _terms(samples, length)) + shift for coefficients, shift in self._fits)
        return added if self.knows(samples, length) else unseen * added

    def _fit(self) -> list[tuple[list[float], float]]:
        rows = [*(_terms(*shape) for shape in self._added), (1.0, 0.0, 0.0)]  # the last: a step of no samples
        added = [*self._added.values(), 0.0]
        fits = []
        for columns in ((0,), (0, 1), (0, 2), (0, 1, 2)):
            coefficients = _least_squares([[row[c] for c in columns] for row in rows], added)
            if coefficients is None or min(coefficients[1:], default=0.0) < 0:
                continue
            full = [0.0, 0.0, 0.0]
            for column, coefficient in zip(columns, coefficients, strict=True):
                full[column] = coefficient
            gaps = [value - _dot(full, row) for row, value in zip(rows, added, strict=True)]
            fits.append((sum(gap * gap for gap in gaps), full, max(0.0, *gaps)))
        # Where lengths never differed, b and c cannot be told apart: all fits as good as the best are asked, and the
        # most careful answer counts.
        best = min(error for error, _, _ in fits)
        slack = 1e-9 * sum(value * value for value in added)
        return [(full, shift) for error, full, shift in fits if error <= 1.05 * best + slack]

    def largest_that_fits(self, samples: int, length: int, room_bytes: float, *, unseen: float = 1.0) -> int:
        """Returns the most samples of this length, from 1 to `samples`, that are predicted to add at most the room."""
        if self._fits_into(samples, length, room_bytes, unseen):
            return samples
        low, high = 1, samples
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits_into(middle, length, room_bytes, unseen):
                low = middle
            else:
                high = middle - 1
        return low

    def _fits_into(self, samples: int, length: int, room_bytes: float, unseen: float) -> bool:
        terms = _terms(samples, length)
        has_failed = any(
            room_bytes <= _MORE * room and all(map(operator.le, _terms(*shape), terms))
            for shape, room in self._exceeded.items()
        )
        return not has_failed and (self.predict(samples, length, unseen=unseen) or 0.0) <= room_bytes

    def clear(self) -> None:
        """Forgets every measurement."""
        self._added = {}
        self._exceeded = {}
        self._fits = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the measurements as plain Python."""
        shapes = {"added": self._added, "exceeded": self._exceeded}
        return {name: [[*shape, value] for shape, value in values.items()] for name, values in shapes.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the measurements of `state_dict`."""
        self._added, self._exceeded = (
            {(int(samples), int(length)): float(value) for samples, length, value in state[name]}
            for name in ("added", "exceeded")
        )
        self._fits = None


def _terms(samples: int, length: int) -> tuple[float, float, float]:
    return 1.0, float(samples * length), float(samples * length * length)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float] | None:
    """Solves the normal equations with columns scaled to 1; None where they are singular."""
    width = len(rows[0])
    scales = [max(abs(row[column]) for row in rows) for column in range(width)]
    if not all(scales):
        return None
    scaled = [[row[c] / scales[c] for c in range(width)] for row in rows]
    matrix = [
        [sum(row[i] * row[j] for row in scaled) for j in range(width)]
        + [sum(row[i] * value for row, value in zip(scaled, values, strict=True))]
        for i in range(width)
    ]
    for pivot in range(width):
        best = max(range(pivot, width), key=lambda row: abs(matrix[row][pivot]))
        matrix[pivot], matrix[best] = matrix[best], matrix[pivot]
        if abs(matrix[pivot][pivot]) < 1e-9:
            return None
        for row, column in itertools.product(range(width), [pivot]):
            if row != pivot:
                factor = matrix[row][column] / matrix[pivot][pivot]
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[pivot], strict=True)]
    return [matrix[i][width] / matrix[i][i] / scales[i] for i in range(width)]
