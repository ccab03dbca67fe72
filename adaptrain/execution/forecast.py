"""What a step is expected to take of memory, beside what is free now; learned from the steps that are measured."""

from __future__ import annotations

import math
import time
from typing import Any

from adaptrain.execution.memory import StepMemory
from adaptrain.policies.peak_memory import PeakMemoryFit

_LOOK_SHARE = 0.01  # of the time goes into looks at what others leave; one takes 0.2 ms on the host
_LONGEST_LOOK_AGE_S = 0.05  # where a busy machine makes looks slow, what they saw must not get old
_PLENTY = 3  # shapes that were measured, and times the predicted memory that there is room for, to measure no more
_MEASURE_EVERY = 100  # steps between two measurements, where neither the size nor the shape is new
# What the same step takes of the host's heap differs by a fifth with how its free blocks lie, and nothing larger was
# seen: a step of unseen size is expected to take this much more than the fit says, where running out is a kill.
_UNSEEN = 1.25


class MemoryForecast:
    """Predicts the peak of a step, and measures steps to be able to.

    A look at what is in use and what is allowed is made when the last one is old: other processes take memory and
    give it back at any time. Before a size is refused, memory that is free and still counts as used is given back and
    counted again. Where running out may end the process and there is not plenty of room, every step is looked at
    before and its peak is read after: a heap in pieces takes more than it did when the step was measured.

    Args:
        memory: Reads what is used and allowed.
        fit: Predicts what a step adds.
    """

    def __init__(self, memory: StepMemory, fit: PeakMemoryFit) -> None:
        self._memory = memory
        self._fit = fit
        self._next_look_s = -math.inf
        self._unseen = _UNSEEN if memory.can_kill else 1.0
        self._before: dict[str, Any] | None = None
        self._measures = self._is_watched = False
        self._size = 0
        self._steps = 0
        self.used_bytes = 0.0
        self.limit_bytes = math.inf
        self.peak_bytes = 0  # of the last step; 0 where it was not read

    @property
    def is_blind(self) -> bool:
        """Whether nothing was measured yet, where running out may end the process rather than raise an error."""
        return self._memory.can_kill and self._fit.predict(1, 1) is None

    def forget(self) -> None:
        """Measures anew: the model has changed."""
        self._fit.clear()
        self._before = None
        self._size = 0

    def look(self, samples: int, length: int) -> None:
        """Reads what is used and allowed, where the last reading is old or a step of this shape may come close."""
        if self._may_be_killed(samples, length) or time.perf_counter() >= self._next_look_s:
            self._look()

    def _look(self) -> None:
        began = time.perf_counter()
        self.used_bytes, self.limit_bytes = float(self._memory.used_bytes()), self._memory.limit_bytes()
        now = time.perf_counter()
        self._next_look_s = now + min(_LONGEST_LOOK_AGE_S, (now - began) / _LOOK_SHARE)

    def peak(self, samples: int, length: int) -> float | None:
        """Returns the peak in bytes that a step of this shape would reach now; None before anything was measured."""
        added = self._fit.predict(samples, length, unseen=self._unseen)
        if added is None:
            return None
        if self.used_bytes + added > self.limit_bytes:
            self._memory.release()
            self._look()
        return self.used_bytes + added

    def most(self, samples: int, length: int) -> int:
        """Returns the most samples at once, from 1 to `samples`, that are predicted to fit now."""
        self.peak(samples, length)  # counts again what is free, where it is close
        room = self.limit_bytes - self.used_bytes
        return self._fit.largest_that_fits(samples, length, room, unseen=self._unseen)

    def exceeded(self, samples: int, length: int) -> None:
        """Takes in that a step of this shape ran out of memory although it was predicted to fit."""
        self._fit.exceeded(samples, length, room_bytes=self.limit_bytes - self.used_bytes)

    def knows(self, samples: int, length: int) -> bool:
        """Whether a step at least as large was measured."""
        return self._fit.knows(samples, length)

    def start(self, samples: int, length: int, *, size: int) -> bool:
        """Begins to measure a step where that tells something new, and there is not plenty of room whatever it tells.

        A measured step is slower: the heap's free blocks are given back before it, and taken again.

        Args:
            samples: Samples at once.
            length: Columns of each.
            size: The size in force. The first step of each is measured: it does not count for speed.

        Returns:
            Whether it is measured. `stop` is to be called in any case.
        """
        self._steps += 1
        is_due = self._steps % _MEASURE_EVERY == 0 or self._before is not None
        is_new = size != self._size or not self._fit.knows(samples, length)
        has_plenty = self._fit.measured >= _PLENTY and self._has_plenty(samples, length)
        self._measures = is_due or (is_new and not has_plenty)
        self._is_watched = self._measures or self._may_be_killed(samples, length)
        self._size = size
        self.peak_bytes = 0
        if self._measures:
            self._memory.release()  # what a step takes from free blocks of the heap would not be seen
        if self._is_watched:
            self._memory.start()
        return self._measures

    def _has_plenty(self, samples: int, length: int) -> bool:
        added = self._fit.predict(samples, length) or math.inf
        return self.used_bytes + _PLENTY * added < self.limit_bytes

    def _may_be_killed(self, samples: int, length: int) -> bool:
        if not self._memory.can_kill or not self._fit.measured:
            return False  # nothing to compare with what is left, as in a dry run, or where a batch cannot be split
        return not (self._fit.knows(samples, length) and self._has_plenty(samples, length))

    def stop(self) -> bool:
        """Ends the step; returns whether its peak was read, measured or not: then it is `peak_bytes`, and to learn."""
        if self._is_watched:
            self.peak_bytes = self._memory.stop()
        return self._is_watched

    def learn(self, samples: int, length: int, *, beside_bytes: int = 0) -> None:
        """Takes in the step whose peak was read. One that was not measured only ever raises what is expected.

        Args:
            samples: Samples of its largest micro-batch.
            length: Columns of it.
            beside_bytes: What other steps have in use beside what this one had.
        """
        added = self._memory.added_bytes(self.peak_bytes) + beside_bytes
        if not self._measures and added <= (self._fit.predict(samples, length) or 0.0):
            return  # it ran in free blocks of the heap
        # The first step also takes what stays: gradients, workspaces of libraries. It counts until there is a second.
        if self._before is not None:
            self._fit.load_state_dict(self._before)
            self._before = None
        elif self._steps == 1:
            self._before = self._fit.state_dict()
        self._fit.observe(samples, length, added_bytes=added)
