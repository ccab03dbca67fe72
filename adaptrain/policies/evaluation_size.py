"""How much of a batch evaluation runs at once, after memory has run out there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptrain.policies.batch_size import Forecast, MicroBatchSizePolicy, Proposal

_MOST_DOUBLINGS = 6


class EvaluationSizePolicy:
    """Decides how many samples a validation, test or predict step runs at once.

    Batches run whole until memory runs out. From then on that stage runs at most half of what failed, counted in
    elements of the input, so that batches of shorter sequences keep more samples. After `growth_interval` split
    batches without an error it grows back by an eighth, and in the end to whole batches again. Each time a stage runs
    out of memory once more after that, it waits twice as long.

    Args:
        growth_interval: Split batches without an error before a larger size.
    """

    def __init__(self, *, growth_interval: int = 50) -> None:
        self.growth_interval = growth_interval
        self._stages: dict[str, MicroBatchSizePolicy] = {}  # their unit: elements of the input
        self._times: dict[str, int] = {}  # how often each was limited

    def limits(self, stage: str) -> bool:
        """Whether memory has run out in `stage`; else its batches run whole."""
        return stage in self._stages

    def size(self, stage: str, elements: int) -> int:
        """Returns the most samples to run at once in a stage that is limited.

        Args:
            stage: Names the stage, and the loader where there are several.
            elements: Elements of the input per sample.

        Returns:
            The number.
        """
        return max(1, self._stages[stage].size // elements)

    def out_of_memory(self, stage: str, failed: int, elements: int) -> Proposal:
        """Takes in a step that ran out of memory.

        Args:
            stage: Where.
            failed: Samples at once when it did; more than 1.
            elements: Elements of the input per sample.

        Returns:
            The size for the same samples again.
        """
        policy = self._stages.get(stage)
        if policy is None:
            times = self._times[stage] = self._times.get(stage, 0) + 1
            policy = self._stages[stage] = self._policy(failed * elements, times)
        policy.out_of_memory(failed * elements)
        new = min(max(1, policy.size // elements), failed // 2)
        reason = f"Memory ran out in {stage} at {failed} samples at once; the same samples run again at {new}."
        return Proposal(failed, new, reason)

    def succeeded(self, stage: str, elements: int) -> Proposal | None:
        """Takes in a batch that was split and ran without an error.

        Args:
            stage: Where.
            elements: Elements of the input per sample.

        Returns:
            The change to make, or None.
        """
        policy = self._stages[stage]
        old = max(1, policy.size // elements)
        if policy.observe(batch_size=policy.fixed or 0, samples_per_s=None, forecast=lambda size: Forecast()) is None:
            return None
        new = max(1, policy.size // elements)
        if policy.size == policy.fixed:
            del self._stages[stage]
        elif new == old:
            return None
        reason = f"{policy.growth_interval} batches of {stage} without an error: grows back to {new} samples at once."
        return Proposal(old, new, reason)

    def restart(self) -> None:
        """Forgets every error: the model or the machine is another one."""
        self._stages, self._times = {}, {}

    def _policy(self, elements: int, times: int) -> MicroBatchSizePolicy:
        interval = self.growth_interval * 2 ** min(times - 1, _MOST_DOUBLINGS)
        policy = MicroBatchSizePolicy(fixed=elements, growth_interval=interval)
        policy.begin(elements)
        return policy

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain Python."""
        stages = {stage: {"whole": p.fixed, "policy": p.state_dict()} for stage, p in self._stages.items()}
        return {"stages": stages, "times": dict(self._times)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self._stages, self._times = {}, dict(state["times"])
        for stage, kept in state["stages"].items():
            self._stages[stage] = self._policy(kept["whole"], self._times[stage])
            self._stages[stage].load_state_dict(kept["policy"])
