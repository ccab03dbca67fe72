"""Micro-batching of every step: layout, size, run, measure, learn."""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import replace
from typing import Any

from torch import nn

from adaptrain.errors import ConfigurationError
from adaptrain.execution.memory import GIB, StepMemory
from adaptrain.execution.noise import NoiseProbe, NoiseSample
from adaptrain.execution.plan import Split
from adaptrain.execution.ranks import Ranks
from adaptrain.execution.split import BatchLayout, Piece, batch_size, layout
from adaptrain.execution.step import Failure, Outcome, StepRunner
from adaptrain.execution.weight import WeightBy
from adaptrain.policies.batch_size import Forecast, MicroBatchSizePolicy, Proposal
from adaptrain.policies.peak_memory import PeakMemoryFit
from adaptrain.policies.piece_time import PieceTimeFit

_log = logging.getLogger(__name__)
_LOOK_EVERY = 20  # steps between two looks at memory once the size has settled


class MicroBatching:
    """Runs each batch in micro-batches of the size that the policy asks for and that is predicted to fit.

    Args:
        module: The module that is trained.
        policy: Decides the size.
        fit: Predicts memory.
        time_fit: Learns what a micro-batch costs beside its tokens, so that batches are cut where it is cheapest; None:
            micro-batches are even in size.
        memory: Measures it.
        ranks: The ranks of the run.
        by_length: Sort by length and trim padding where a batch allows it.
        weight_by: See `adaptrain.execution.weight.sample_weights`.
        split: The user's own split, or None.
        measure_noise: Take gradient norms at two batch sizes in each step, where it can be.
        overlap: Reduce gradients while the last backward of a step runs; see `StepRunner`.
        dry_run: Run every batch as Lightning does; only propose.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        policy: MicroBatchSizePolicy,
        fit: PeakMemoryFit,
        time_fit: PieceTimeFit | None = None,
        memory: StepMemory,
        ranks: Ranks,
        by_length: bool,
        weight_by: WeightBy,
        split: Split | None = None,
        measure_noise: bool = False,
        overlap: bool = False,
        dry_run: bool = False,
    ) -> None:
        self.proposals: list[Proposal] = []
        self.samples = 0  # of the batch just run, on this rank
        self._policy = policy
        self._fit = fit
        self._time_fit = time_fit
        self._memory = memory
        self._ranks = ranks
        self._by_length = by_length
        self._split = split
        self._dry_run = dry_run
        self._noise = NoiseProbe(module, ranks) if measure_noise else None
        self._runner = StepRunner(
            module,
            ranks=ranks,
            weight_by=weight_by,
            split=split,
            report=memory.report,
            noise=self._noise,
            overlap=overlap,
        )
        # Rotary embeddings know positions relative to each other: padding on the left may go.
        self._trim_left = any(name.endswith("inv_freq") for name, _ in module.named_buffers())
        self._steps = 0
        self._limit = math.inf
        self._longest = 1
        self._samples_seen = 0
        self._tokens_seen = 0
        self._smallest_cap: float = math.inf
        self._said: set[str] = set()

    @property
    def size(self) -> int:
        """The micro-batch size in force."""
        return self._policy.size

    @property
    def noise(self) -> NoiseSample | None:
        """The gradient norms of the step just run, where they could be taken."""
        return self._noise.sample if self._noise is not None else None

    def forget(self) -> None:
        """Measures anew: the model has changed."""
        self._policy.restart()
        self._fit.clear()
        if self._time_fit is not None:
            self._time_fit.clear()
        self._smallest_cap = math.inf
        self._longest = 1

    def run(self, step: Any) -> Any:
        """Runs one step; what is to be recorded waits in `proposals`.

        Args:
            step: A `ClosureStep`.

        Returns:
            What goes back to Lightning.
        """
        shape = self._layout(step.batch)
        samples = self.samples = shape.size if shape is not None else batch_size(step.batch) or 0
        if not self._steps:
            self._begin(samples)
        if self._steps % _LOOK_EVERY == 0 or self._policy.is_searching:
            self._limit = self._memory.limit_bytes()
        self._steps += 1
        if self._dry_run:
            return self._watch(step, shape)

        size = self._policy.size
        length = shape.length if shape is not None else 1
        if shape is not None and shape.spans is not None:
            length = max(stop - start for start, stop in shape.spans)
        cap = self._fit.largest_that_fits(min(size, samples), length, self._limit) if shape is not None else size
        look = (
            self._policy.is_searching
            or self._steps % _LOOK_EVERY == 0
            or (shape is not None and not self._fit.knows(*_largest(shape.pieces(min(size, cap)))))
        )
        if look:
            self._memory.start()
        began = time.perf_counter()
        notes = [float(samples), -float(cap) if cap < min(size, samples) else -math.inf]
        timed = look and self._time_fit is not None
        outcome = self._runner.run(step, shape, min(size, cap), shrink=self._shrink, notes=notes, timed=timed)
        peak = self._memory.stop() if look else None
        seconds = time.perf_counter() - began
        self._learn(outcome, shape, length, peak)
        self._say_cap(outcome.maxima[1], length)
        self._ask(outcome, shape, samples, seconds, peak or 0)
        return outcome.result

    def _begin(self, samples: int) -> None:
        most = int(self._ranks.maxima([float(samples)])[0])
        if not most and self._policy.fixed is None and self._split is not None:
            raise ConfigurationError(
                "micro_batch_size='auto' needs a batch whose samples can be counted, but its tensors do not share one"
                " size in dimension 0. Give micro_batch_size as a number for your split."
            )
        if proposal := self._policy.begin(max(1, most)):
            self.proposals.append(proposal)

    def _layout(self, batch: Any) -> BatchLayout | None:
        if self._split is not None:
            return None
        cost = self._time_fit.piece_cost if self._time_fit is not None else None
        shape = layout(batch, by_length=self._by_length, trim_left=self._trim_left, piece_cost=cost)
        if shape is None and "whole" not in self._said:
            self._said.add("whole")
            warnings.warn(
                "BatchSizeController cannot split this batch: its tensors do not share one size in dimension 0. It"
                " runs whole. Give `split`, a callable (batch, micro_batch_size) -> micro-batches, to serve it.",
                stacklevel=2,
            )
        if shape is not None and shape.length == 1 and self._by_length and "samples" not in self._said:
            self._said.add("samples")
            _log.info("The batch has no attention_mask to tell its padding: it is split by samples, not by tokens.")
        return shape

    def _watch(self, step: Any, shape: BatchLayout | None) -> Any:
        if self._steps > 1 or shape is None:
            return step.run_unsplit()
        self._memory.start()
        result = step.run_unsplit()
        peak = self._memory.stop()
        seen = f" The whole batch of {shape.size} took {peak / GIB:.2f} of {self._limit / GIB:.2f} GiB."
        readings = {"peak_gib": round(peak / GIB, 4), "limit_gib": round(self._limit / GIB, 4)}
        self.proposals = [Proposal(p.old, p.new, p.reason + seen, p.readings | readings) for p in self.proposals]
        return result

    def _shrink(self, failure: Failure) -> int:
        proposal = self._policy.out_of_memory(failure.size)
        used, limit = self._ranks.maxima([self._memory.used_bytes(), -self._limit])
        readings = {"used_gib": round(used / GIB, 4), "limit_gib": round(-limit / GIB, 4)}
        self.proposals.append(Proposal(proposal.old, proposal.new, proposal.reason, proposal.readings | readings))
        return proposal.new

    def _learn(self, outcome: Outcome, shape: BatchLayout | None, length: int, peak: int | None) -> None:
        # The first step lacks the optimizer's state: its peak would make every later one look smaller than it is.
        if shape is None or outcome.failures or peak is None or self._steps == 1:
            return
        largest = _largest(outcome.pieces)
        self._fit.observe(*largest, peak_bytes=float(peak), floor_bytes=float(self._memory.floor_bytes))
        self._longest = max(self._longest, length)
        if self._time_fit is not None:
            for number, seconds in outcome.seconds.items():
                self._time_fit.observe(outcome.pieces[number].size * outcome.pieces[number].length, seconds)

    def _say_cap(self, negative_cap: float, length: int) -> None:
        """Records when a batch had to run in smaller pieces than the size in force, once for each smaller cap."""
        cap = -negative_cap
        if cap >= min(self._smallest_cap, self._policy.size):
            return
        self._smallest_cap = cap
        outlook = self._forecast(self._policy.size, length)
        reason = f"A batch as long as this one runs at {int(cap)} samples at once: at {self._policy.size} it would take"
        reason += f" {outlook.predicted_gib or 0:.2f} GiB of the {outlook.limit_gib or 0:.2f} GiB allowed."
        self.proposals.append(Proposal(self._policy.size, int(cap), reason, outlook.readings))

    def _ask(self, outcome: Outcome, shape: BatchLayout | None, samples: int, seconds: float, peak: int) -> None:
        most = int(outcome.maxima[0])
        rate = None
        measured = {}
        if self._policy.is_searching and not outcome.failures and most:
            seconds, highest = self._ranks.maxima([seconds, float(peak)])
            rate = self._work(shape, samples) / max(1e-9, seconds)
            measured = {"peak_gib": round(highest / GIB, 4)}
        proposal = self._policy.observe(
            batch_size=most, samples_per_s=rate, forecast=lambda size: self._forecast(size, self._longest)
        )
        if proposal is not None:
            self.proposals.append(replace(proposal, readings=proposal.readings | measured))

    def _work(self, shape: BatchLayout | None, samples: int) -> float:
        """The batches of all ranks in samples of average length: one of long sentences does not make a size slow."""
        tokens = samples
        if shape is not None and shape.spans is not None:
            tokens = sum(stop - start for start, stop in shape.spans)
        self._samples_seen += samples
        self._tokens_seen += tokens
        return self._ranks.sums([tokens * self._samples_seen / max(1, self._tokens_seen)])[0]

    def _forecast(self, size: int, length: int) -> Forecast:
        predicted = self._fit.predict(size, length)
        most, limit = self._ranks.maxima([-1.0 if predicted is None else predicted, -self._limit])
        return Forecast(None if most < 0 else most / GIB, -limit / GIB)


def _largest(pieces: list[Piece]) -> tuple[int, int]:
    """The samples and columns of the micro-batch that takes the most memory, as far as its tokens tell."""
    largest = max(pieces, key=lambda piece: piece.size * piece.length)
    return largest.size, largest.length
