"""Which micro-batch size comes next: a search for the fastest that fits, halving on an error, growing back after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

_SLOWER = 0.9  # a size this much slower than the best ends the search upwards
_LONGEST_HOLD = 64  # a ceiling is kept for at most this many growth intervals


@dataclass(frozen=True)
class Forecast:
    """The memory a size would need.

    Args:
        predicted_gib: Its predicted peak, or None where nothing is known yet.
        limit_gib: The limit, or None without one.
    """

    predicted_gib: float | None = None
    limit_gib: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the size may be tried."""
        return self.predicted_gib is None or self.limit_gib is None or self.predicted_gib <= self.limit_gib

    @property
    def readings(self) -> dict[str, float]:
        """The numbers that are known, by name."""
        values = {"predicted_gib": self.predicted_gib, "limit_gib": self.limit_gib}
        return {name: round(value, 4) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Proposal:
    """A change of the micro-batch size.

    Args:
        old: Samples at once before.
        new: Samples at once from now on.
        reason: One sentence for a person.
        readings: The numbers that led to it, by name.
    """

    old: int
    new: int
    reason: str
    readings: dict[str, float] = field(default_factory=dict)


class MicroBatchSizePolicy:
    """Decides the micro-batch size from measured speed, predicted memory and out-of-memory errors.

    Left to itself it begins at an eighth of the batch and doubles while the next size is predicted to fit and is not
    clearly slower, tries smaller ones while those are as fast, and settles on the smallest size within `tolerance` of
    the best throughput: what is saved in memory costs no speed. An error halves the size; after `growth_interval`
    steps without one it grows back by an eighth at a time, below the size that failed, until that ceiling is
    forgotten (each failure doubles the time it is kept).

    Speeds are measured, so that two runs may settle on different sizes. The gradients are the same up to rounding.

    Args:
        fixed: Begin with this size and grow back to it, without a search; None: search.
        probe_steps: Steps that count for a size's speed (their median), after one that does not.
        growth_interval: Steps without an error before a larger size.
        tolerance: How much slower than the best the settled size may be.
    """

    def __init__(
        self, *, fixed: int | None = None, probe_steps: int = 5, growth_interval: int = 50, tolerance: float = 0.02
    ) -> None:
        self.fixed = fixed
        self.probe_steps = probe_steps
        self.growth_interval = growth_interval
        self.tolerance = tolerance
        self.size = fixed or 0
        self._largest = 0
        self._searching = fixed is None
        self._target = fixed or 0
        self._trials: dict[int, list[float]] = {}
        self._is_warm = False
        self._memory_bound = False
        self._quiet = 0
        self._ceiling: int | None = None
        self._hold = 0
        self._failures = 0

    @property
    def is_searching(self) -> bool:
        """Whether speeds are being compared: the caller should measure every step."""
        return self._searching

    def begin(self, batch_size: int) -> Proposal | None:
        """Tells the samples of the batch that comes next.

        Args:
            batch_size: Samples of the whole batch, the most of any rank.

        Returns:
            The first size, at the first batch it changes anything for; else None.
        """
        first = not self._largest
        self._largest = max(self._largest, batch_size)
        if not first:
            return None
        if self.fixed is not None:
            if self.fixed >= batch_size:
                return None
            return Proposal(batch_size, self.fixed, f"micro_batch_size={self.fixed} was given.")
        if not self.size:
            self.size = max(1, batch_size // 8)
            if self.size < batch_size:
                reason = (
                    f"The search for the fastest size that fits begins small, at {self.size} of {batch_size} samples."
                )
                return Proposal(batch_size, self.size, reason)
        return None

    def observe(
        self, *, batch_size: int, samples_per_s: float | None, forecast: Callable[[int], Forecast]
    ) -> Proposal | None:
        """Takes in a step that succeeded.

        Args:
            batch_size: Samples of the whole batch, the most of any rank.
            samples_per_s: Its speed, the same number on every rank; None where it was not measured.
            forecast: Answers what a size would need. It may be asked several times; on every rank alike.

        Returns:
            The change to make, or None.
        """
        self._quiet += 1
        if self._ceiling is not None:
            self._hold -= 1
            if self._hold <= 0:
                self._ceiling = None
        if not self._searching:
            return self._grow(forecast)
        if samples_per_s is None or 2 * batch_size < self._largest:
            return None  # the short last batch of an epoch says little
        if not self._is_warm:
            self._is_warm = True
            return None
        trial = self._trials.setdefault(self.size, [])
        trial.append(samples_per_s)
        return self._next_trial(forecast) if len(trial) >= self.probe_steps else None

    def out_of_memory(self, failed: int) -> Proposal:
        """Takes in a step that ran out of memory.

        Args:
            failed: Samples at once when it did, the most of any rank; more than 1.

        Returns:
            The size for the same samples again.
        """
        old, new = self.size, max(1, failed // 2)
        self._ceiling = failed
        self._hold = self.growth_interval * min(_LONGEST_HOLD, 2**self._failures)
        self._failures += 1
        self._quiet = 0
        if self._searching:
            self._memory_bound = True
            self._trials = {size: rates for size, rates in self._trials.items() if size < failed}
            if complete := self._speeds():
                new = min(new, self._settle(complete))
            self._is_warm = False
        self.size = min(old, new)
        reason = f"Memory ran out at {failed} samples at once; the same samples run again at {self.size}."
        return Proposal(old, self.size, reason)

    def restart(self) -> None:
        """Forgets what was measured: the model or the machine is another one. The size stays as the start."""
        self._trials = {}
        self._is_warm = False
        self._memory_bound = False
        self._ceiling = None
        self._failures = 0
        self._searching = self.fixed is None

    def _speeds(self) -> dict[int, float]:
        return {size: median(rates) for size, rates in self._trials.items() if len(rates) >= self.probe_steps}

    def _settle(self, speeds: Mapping[int, float]) -> int:
        best = max(speeds.values())
        self._searching = False
        self._target = min(size for size, speed in speeds.items() if speed >= (1 - self.tolerance) * best)
        return self._target

    def _next_trial(self, forecast: Callable[[int], Forecast]) -> Proposal | None:
        speeds = self._speeds()
        best = max(speeds.values())
        highest, lowest = max(speeds), min(speeds)
        up = min(self._largest, 2 * highest)
        if up > highest and speeds[highest] >= _SLOWER * best:
            outlook = forecast(up)
            if self._is_below_ceiling(up) and outlook.fits:
                need = "" if outlook.predicted_gib is None else f" ({outlook.predicted_gib:.2f} GiB predicted)"
                return self._change(up, f"Tries {up} samples at once{need}.", speeds, outlook)
            self._memory_bound = True
            why = self._why_not(up, outlook)
        else:
            outlook = Forecast()
            why = f"{highest} is the whole batch" if up == highest else f"{highest} was slower"
        if lowest > 1 and speeds[lowest] >= (1 - self.tolerance) * best:
            return self._change(lowest // 2, f"{lowest} is among the fastest; tries {lowest // 2}.", speeds, outlook)
        chosen = self._settle(speeds)
        reason = f"{chosen} samples at once is the smallest within {self.tolerance:.0%} of the best speed; {why}."
        return self._change(chosen, reason, speeds, outlook)

    def _grow(self, forecast: Callable[[int], Forecast]) -> Proposal | None:
        goal = min(self._target, self._largest)
        if self.size < goal:
            if self._quiet < self.growth_interval:
                return None
            larger = min(goal, self.size + max(1, goal // 8))
            what = f"{self._quiet} steps without an error: grows back to {larger}."
        elif self.fixed is None and self._memory_bound and self.size < self._largest:
            if self._quiet < 4 * self.growth_interval:
                return None
            larger = min(self._largest, 2 * self.size)
            what = f"There is room for {larger} samples at once now; tries it."
        else:
            return None
        self._quiet = 0
        outlook = forecast(larger)
        if not (self._is_below_ceiling(larger) and outlook.fits):
            return None
        if larger > goal:
            self._searching, self._memory_bound = True, False
        return self._change(larger, what, {}, outlook)

    def _is_below_ceiling(self, size: int) -> bool:
        return self._ceiling is None or size < self._ceiling

    def _why_not(self, size: int, outlook: Forecast) -> str:
        if not outlook.fits:
            return f"{outlook.predicted_gib:.2f} GiB at {size} would exceed the limit of {outlook.limit_gib:.2f} GiB"
        return f"{self._ceiling} ran out of memory"

    def _change(self, new: int, reason: str, speeds: Mapping[int, float], outlook: Forecast) -> Proposal | None:
        old, self.size = self.size, new
        self._is_warm = False
        self._quiet = 0
        readings = dict(outlook.readings)
        if speeds:
            readings["samples_per_s"] = round(speeds.get(new if new in speeds else old, 0.0), 2)
        return Proposal(old, new, reason, readings) if new != old else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain Python."""
        return {
            "size": self.size,
            "largest": self._largest,
            "searching": self._searching,
            "target": self._target,
            "trials": {str(size): list(rates) for size, rates in self._trials.items()},
            "memory_bound": self._memory_bound,
            "quiet": self._quiet,
            "ceiling": self._ceiling,
            "hold": self._hold,
            "failures": self._failures,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; a `fixed` size of now wins over a searched one of then."""
        self._largest = state["largest"]
        self._quiet, self._ceiling = state["quiet"], state["ceiling"]
        self._hold, self._failures = state["hold"], state["failures"]
        if self.fixed is not None:
            self.size = min(self.fixed, state["size"]) if state["ceiling"] else self.fixed
            return
        self.size, self._target = state["size"], state["target"] or state["size"]
        self._searching, self._memory_bound = state["searching"], state["memory_bound"]
        self._trials = {int(size): list(rates) for size, rates in state["trials"].items()}
