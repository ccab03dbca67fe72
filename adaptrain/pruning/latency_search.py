"""Which structure takes as long as it may: a search by noisy measurements of a few of them. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

FITS = 0.97  # of a latency limit: a measurement above it may be one of a model that exceeds the limit
NEAR = 0.91  # of a latency limit: below it, more was cut than needed
_AIM = 0.95  # of a latency limit: between the two others
_SPREAD = 0.045  # standard deviation of one measured share of a limit, at least
_LUCKY = 4  # measurements that may agree by chance: a candidate is chosen by more of them
_UNDECIDED = 10  # measurements of a candidate, at most
_CANDIDATES = 6  # structures that are measured before one is chosen, at most
_CLOSE = 1.06  # an aim that fails over one that fits: what is between them is not worth another candidate
_APART = 1.01  # two aims, one over the other, at least
_STRIDE = 0.75  # the most that one value, which may be off, moves the aim
_ALIKE = 1.1  # the table's values of two candidates, one over the other: it is off by the same factor for both


@dataclass(eq=False)
class Candidate:
    """A structure that is measured.

    Args:
        aim: The share of the limit that it was to take by the table.
        by_table: The share that it takes by the table.
        measured: The shares that it took.
    """

    aim: float
    by_table: float
    measured: list[float] = field(default_factory=list)

    @property
    def off(self) -> float:
        """By which factor the table is off, as far as this candidate tells."""
        return fmean(self.measured) / self.by_table


class LatencySearch:
    """Moves an aim until a candidate takes just less than the limit, and says how often to measure each.

    What a table interpolates and adds up is off, by about the same factor for structures that are much alike. So a
    measurement of one of them counts for the others, too, as long as their means agree: on a busy machine a few
    measurements of each would choose one that was lucky, or refuse all that were not.
    """

    def __init__(self) -> None:
        self.candidates: list[Candidate] = []

    def next_aim(self) -> float | None:
        """Returns the share of the limit for the next candidate to take by the table; None where none is worth it."""
        if not self.candidates:
            return _AIM
        last = self.candidates[-1]
        if NEAR <= self.used(last) <= FITS or len(self.candidates) == _CANDIDATES:
            return None
        fits = max((each.aim for each in self.candidates if self.used(each) <= FITS), default=0.0)
        fails = min((each.aim for each in self.candidates if self.used(each) > FITS), default=math.inf)
        if fails < _CLOSE * fits:
            return None
        aim = last.aim * min(1 / _STRIDE, max(_STRIDE, _AIM / self.used(last)))
        if fits > 0 and fails < math.inf and not _APART * fits < aim < fails / _APART:
            aim = math.sqrt(fits * fails)
        return aim

    def add(self, aim: float, by_table: float) -> Candidate:
        """Takes in the candidate that was found for an aim, not measured yet."""
        self.candidates.append(Candidate(aim, by_table))
        return self.candidates[-1]

    def is_decided(self, candidate: Candidate) -> bool:
        """Whether it was measured often enough: two standard errors tell that it will do, or that it will not."""
        own = len(candidate.measured)
        if own in (0, _UNDECIDED):
            return own > 0
        used, count = self._estimate(candidate)
        doubt = 2 * self._spread() / math.sqrt(count)
        if count > _LUCKY and NEAR <= used <= 1 - doubt:
            return True
        doubt *= 1 + 1 / count  # how much a single one is off is not known yet
        return used < NEAR - doubt or used > FITS + doubt

    def used(self, candidate: Candidate) -> float:
        """Returns the share of the limit that a measured candidate takes."""
        return self._estimate(candidate)[0]

    def best(self) -> Candidate:
        """Returns of those that fit the slowest, which kept the most; where none fits, the fastest."""
        fitting = [each for each in self.candidates if self.used(each) <= FITS]
        return max(fitting, key=self.used) if fitting else min(self.candidates, key=self.used)

    def _estimate(self, candidate: Candidate) -> tuple[float, int]:
        """Returns the share of the limit, and the number of measurements that tell it."""
        alike = [each for each in self.candidates if each is candidate or self._agree(each, candidate)]
        off = [share / each.by_table for each in alike for share in each.measured]
        return candidate.by_table * fmean(off), len(off)

    def _agree(self, one: Candidate, other: Candidate) -> bool:
        if not one.measured or not 1 / _ALIKE <= one.by_table / other.by_table <= _ALIKE:
            return False
        error = self._spread() * math.sqrt(1 / len(one.measured) + 1 / len(other.measured))
        return abs(one.off / other.off - 1) <= 2 * error

    def _spread(self) -> float:
        """Returns the standard deviation of one measurement, as a share of what is measured."""
        free = sum(len(each.measured) - 1 for each in self.candidates if each.measured)
        if free < 2:
            return _SPREAD
        squares = sum((share / fmean(each.measured) - 1) ** 2 for each in self.candidates for share in each.measured)
        return max(_SPREAD, math.sqrt(squares / free))
