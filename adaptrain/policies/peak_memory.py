"""Predicting the peak memory of a step from the peaks of steps before it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

_KEPT = 64


class PeakMemoryFit:
    """Fits peak ≈ a + b·B·L + c·B·L² to measured steps of B samples, each L columns long.

    `a` is what stays whatever the batch (weights, gradients, optimizer state), `b` the activations, `c` attention. The
    coefficients are at least zero, and the fit is raised by its largest shortfall, so that no step that was measured
    would have been predicted too low.
    """

    def __init__(self) -> None:
        self._peaks: dict[tuple[int, int], float] = {}
        self._floor: float | None = None
        self._fits: list[tuple[list[float], float]] | None = None  # coefficients and shift, until the next measurement

    def observe(self, samples: int, length: int, *, peak_bytes: float, floor_bytes: float) -> None:
        """Adds a measured step.

        Args:
            samples: Samples at once.
            length: Columns of each; 1 where there are no sequences.
            peak_bytes: The peak during the step.
            floor_bytes: Memory in use before it. The lowest seen stands for a step of no samples.
        """
        shape = samples, length
        self._fits = None
        self._peaks[shape] = max(peak_bytes, self._peaks.get(shape, 0.0))
        self._floor = floor_bytes if self._floor is None else min(floor_bytes, self._floor)
        if len(self._peaks) > _KEPT:
            # The largest shapes say most about a larger one: the smallest goes.
            del self._peaks[min(self._peaks, key=lambda shape: shape[0] * shape[1])]

    def knows(self, samples: int, length: int) -> bool:
        """Whether a step at least as large was measured."""
        return any(samples <= seen and samples * length <= seen * columns for seen, columns in self._peaks)

    def predict(self, samples: int, length: int) -> float | None:
        """Returns the expected peak in bytes, or None before anything was measured."""
        if not self._peaks or self._floor is None:
            return None
        if self._fits is None:
            self._fits = self._fit(self._floor)
        return max(_dot(coefficients, _terms(samples, length)) + shift for coefficients, shift in self._fits)

    def _fit(self, floor: float) -> list[tuple[list[float], float]]:
        rows = [*(_terms(*shape) for shape in self._peaks), (1.0, 0.0, 0.0)]
        peaks = [*self._peaks.values(), floor]
        fits = []
        for columns in ((0,), (0, 1), (0, 2), (0, 1, 2)):
            coefficients = _least_squares([[row[c] for c in columns] for row in rows], peaks)
            if coefficients is None or min(coefficients[1:], default=0.0) < 0:
                continue
            full = [0.0, 0.0, 0.0]
            for column, coefficient in zip(columns, coefficients, strict=True):
                full[column] = coefficient
            gaps = [peak - _dot(full, row) for row, peak in zip(rows, peaks, strict=True)]
            fits.append((sum(gap * gap for gap in gaps), full, max(0.0, *gaps)))
        # Where lengths never differed, b and c cannot be told apart: all fits as good as the best are asked, and the
        # most careful answer counts.
        best = min(error for error, _, _ in fits)
        slack = 1e-9 * sum(peak * peak for peak in peaks)
        return [(full, shift) for error, full, shift in fits if error <= 1.05 * best + slack]

    def largest_that_fits(self, samples: int, length: int, limit_bytes: float) -> int:
        """Returns the most samples of this length, from 1 to `samples`, whose predicted peak is within the limit."""
        if (self.predict(samples, length) or 0.0) <= limit_bytes:
            return samples
        low, high = 1, samples
        while low < high:
            middle = (low + high + 1) // 2
            if (self.predict(middle, length) or 0.0) <= limit_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def clear(self) -> None:
        """Forgets every measurement."""
        self._peaks = {}
        self._floor = None
        self._fits = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the measurements as plain Python."""
        return {"peaks": [[*shape, peak] for shape, peak in self._peaks.items()], "floor": self._floor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the measurements of `state_dict`."""
        self._peaks = {(int(samples), int(length)): float(peak) for samples, length, peak in state["peaks"]}
        self._floor = state["floor"]
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
