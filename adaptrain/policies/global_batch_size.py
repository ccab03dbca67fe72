"""How many samples one optimizer step sees: a number, or a ramp over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptrain.errors import ConfigurationError
from adaptrain.policies.batch_size import Proposal


class GlobalBatchSizePolicy:
    """A policy of the global batch size; this one leaves it where it is."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that were given, by name: each must be a multiple of the ranks times the accumulated batches."""
        return {}

    def first(self, size: int) -> int:
        """Returns the size to begin with, where the loader's is `size`."""
        return size

    def next(self, size: int, *, progress: float, unit: int) -> Proposal | None:
        """Returns a change that is due, or None.

        Args:
            size: The size in force.
            progress: The share of the run that is spent, in [0, 1].
            unit: What a size must be a multiple of.
        """
        return None

    def changed(self) -> None:
        """Hears that what `next` returned was done."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain Python."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with a state."""


@dataclass(frozen=True)
class FixedGlobalBatchSize(GlobalBatchSizePolicy):
    """One size for the whole run.

    Args:
        size: Samples.
    """

    size: int

    @property
    def sizes(self) -> dict[str, int]:
        """The size."""
        return {"global_batch_size": self.size}

    def first(self, size: int) -> int:
        """Returns the size."""
        return self.size

    def next(self, size: int, *, progress: float, unit: int) -> Proposal | None:
        """Returns the way back to the size: a resumed run may have been given another one."""
        if size == self.size:
            return None
        return Proposal(size, self.size, f"global_batch_size={self.size} was given.")


@dataclass(frozen=True, kw_only=True)
class BatchSizeRamp(GlobalBatchSizePolicy):
    """Doubles the global batch size step by step, evenly over the first part of the run.

    Early steps need little averaging, late ones more: growing the batch does what decaying the learning rate would
    (Smith et al. 2018, arXiv:1711.00489). With n doublings the i-th is due at `until`·i/n of the run, so that `end`
    is reached at `until`. Where `end` is not `begin` times a power of two, the last change is smaller.

    Args:
        begin: Samples of one optimizer step, over all ranks, at the beginning.
        end: The same at the end, at least `begin`.
        until: The share of the run after which `end` is reached, in (0, 1].

    Raises:
        ConfigurationError: A value is out of its range.
    """

    begin: int
    end: int
    until: float = 0.5

    def __post_init__(self) -> None:
        check_size("BatchSizeRamp: begin", self.begin)
        check_size("BatchSizeRamp: end", self.end)
        if self.end < self.begin:
            raise ConfigurationError(
                f"BatchSizeRamp: end must be at least begin, got begin={self.begin} and end={self.end}."
            )
        if not (is_number(self.until) and 0 < self.until <= 1):
            raise ConfigurationError(f"BatchSizeRamp: until must be a share of the run in (0, 1], got {self.until!r}.")

    @property
    def sizes(self) -> dict[str, int]:
        """Where it begins and ends: the sizes between are multiples of the first."""
        return {"begin": self.begin, "end": self.end}

    def first(self, size: int) -> int:
        """Returns `begin`."""
        return self.begin

    def plan(self) -> list[tuple[float, int]]:
        """Returns the changes in order: the share of the run at which each is due, and the size from then on."""
        count = math.ceil(math.log2(self.end / self.begin))
        return [(self.until * i / count, min(self.end, self.begin * 2**i)) for i in range(1, count + 1)]

    def next(self, size: int, *, progress: float, unit: int) -> Proposal | None:
        """Returns the change to the size that is due at `progress`."""
        # Progress is a quotient of counts: a change due at exactly this step must not wait for the next.
        due = [new for share, new in self.plan() if progress >= share - 1e-9]
        new = due[-1] if due else self.begin
        if new == size:
            return None
        reason = f"{progress:.0%} of the run are done: the ramp from {self.begin} to {self.end} samples is at {new}."
        return Proposal(size, new, reason, {"progress": round(progress, 4)})


def global_batch_size_policy(value: Any) -> GlobalBatchSizePolicy | None:
    """Returns the policy for the argument `global_batch_size`: None, a number of samples, or a policy itself.

    Raises:
        ConfigurationError: It is none of these.
    """
    if value is None or isinstance(value, GlobalBatchSizePolicy):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(
            "global_batch_size must be None (the loader's), a whole number of samples of at least 1, BatchSizeRamp(...)"
            f" or GradientNoiseScale(...), got {value!r}."
        )
    return FixedGlobalBatchSize(value)


def check_size(name: str, value: Any, *, what: str = "samples") -> None:
    """Raises `ConfigurationError` for what is no count of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number of {what} of at least 1, got {value!r}.")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
