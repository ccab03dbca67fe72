"""Micro-batching of every step: layout, size, run, measure, learn."""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from adaptrain.errors import ConfigurationError
from adaptrain.execution.forecast import MemoryForecast
from adaptrain.execution.memory import GIB, StepMemory
from adaptrain.execution.noise import NoiseProbe, NoiseSample
from adaptrain.execution.plan import Split
from adaptrain.execution.ranks import Ranks
from adaptrain.execution.split import BatchLayout, Piece, batch_size, layout, why_whole
from adaptrain.execution.step import Failure, Outcome, StepRunner
from adaptrain.execution.weight import WeightBy
from adaptrain.policies.batch_size import Forecast, MicroBatchSizePolicy, Proposal
from adaptrain.policies.peak_memory import PeakMemoryFit
from adaptrain.policies.piece_time import PieceTimeFit

_log = logging.getLogger(__name__)
_CALM_STEPS = 20  # steps that fit again before memory counts as back
_FIRST_SHARE = 64  # the first step runs a 64th of the batch at once, where nothing is known and an error may be a kill


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
        multiple: Of which micro-batches keep columns then.
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
        multiple: int = 1,
        weight_by: WeightBy,
        split: Split | None = None,
        measure_noise: bool = False,
        overlap: bool = False,
        dry_run: bool = False,
    ) -> None:
        self.proposals: list[Proposal] = []
        self.samples = 0  # of the batch just run, on this rank
        self._policy = policy
        self._module = module
        self._time_fit = time_fit
        self._memory = memory
        self._memory_forecast = MemoryForecast(memory, fit)
        self._ranks = ranks
        self._by_length = by_length
        self._multiple = multiple
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
        self._longest = 1
        self._samples_seen = 0
        self._tokens_seen = 0
        self._smallest_cap: float = math.inf
        self._scarce_size = 0
        self._calm: int | None = None  # steps since memory was last scarce; None where it is not
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
        self.forget_memory()
        if self._time_fit is not None:
            self._time_fit.clear()
        self._longest = 1

    def forget_memory(self) -> None:
        """Measures memory anew: the model is as it was, and a step takes more of it."""
        self._memory_forecast.forget()
        self._runner.proven.restart()
        self._smallest_cap = math.inf
        self._calm = None

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
        size = self._policy.size
        length = shape.length if shape is not None else 1
        if shape is not None and shape.spans is not None:
            length = max(stop - start for start, stop in shape.spans)
        wanted = min(size, samples)
        self._memory_forecast.look(wanted, length)
        self._steps += 1
        if self._dry_run:
            return self._watch(step, shape)

        cap = self._memory_forecast.most(wanted, length) if shape is not None else size
        capped = cap < wanted
        scarce = capped and self._memory_forecast.knows(wanted, length)
        if shape is not None and self._policy.fixed is None and self._memory_forecast.is_blind:
            cap = max(1, min(cap, samples // _FIRST_SHARE))
        largest = (cap, 1) if shape is None else _largest(shape.pieces(min(size, cap)))
        measures = self._memory_forecast.start(*largest, size=size)
        timed = self._time_fit is not None and (measures or self._policy.is_searching)
        began = time.perf_counter()
        notes = [float(samples), -float(cap) if capped else -math.inf, float(scarce)]
        # As it is expected now: the step teaches what its size takes, and what was expected is the reason.
        peak = self._memory_forecast.peak(size, length) if capped else None
        notes += [peak or 0.0, -self._memory_forecast.limit_bytes]
        shrink = partial(self._shrink, length=length)
        outcome = self._runner.run(step, shape, min(size, cap), shrink=shrink, notes=notes, timed=timed)
        learns = self._memory_forecast.stop()
        seconds = time.perf_counter() - began
        if learns and shape is not None and not outcome.failures:
            self._learn(step, outcome, length)
        if shape is not None and not outcome.failures and self._steps > 1:
            self._learn_times(outcome)
        _, most, taken, peak, limit = outcome.maxima
        self._say_cap(-most, bool(taken), Forecast(peak / GIB, -limit / GIB))
        self._ask(outcome, shape, samples, seconds)
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
        shape = layout(
            batch,
            by_length=self._by_length,
            trim_left=self._trim_left,
            multiple=self._multiple,
            piece_cost=cost,
        )
        if shape is None and "whole" not in self._said:
            self._said.add("whole")
            warnings.warn(
                f"BatchSizeController cannot split this batch: {why_whole(batch)}. It runs whole. Give `split`, a"
                " callable (batch, micro_batch_size) -> micro-batches, to serve it.",
                stacklevel=2,
            )
        if shape is not None and shape.length == 1 and self._by_length and "samples" not in self._said:
            self._said.add("samples")
            _log.info("The batch has no attention_mask to tell its padding: it is split by samples, not by tokens.")
        return shape

    def _watch(self, step: Any, shape: BatchLayout | None) -> Any:
        if self._steps > 1 or shape is None:
            return step.run_unsplit()
        self._memory.release()
        self._memory.start()
        result = step.run_unsplit()
        peak, limit = self._memory.stop(), self._memory_forecast.limit_bytes
        seen = f" The whole batch of {shape.size} took {peak / GIB:.2f} of {limit / GIB:.2f} GiB."
        readings = {"peak_gib": round(peak / GIB, 4), "limit_gib": round(limit / GIB, 4)}
        self.proposals = [Proposal(p.old, p.new, p.reason + seen, p.readings | readings) for p in self.proposals]
        return result

    def _shrink(self, failure: Failure, *, length: int) -> int:
        if failure.maxima[1] > -math.inf:
            # It ran in smaller pieces than others already, and those were too large: no reason to change the others.
            if failure.message:
                self._memory_forecast.exceeded(failure.size, length)
            new = max(1, failure.size // 2)
            reason = (
                f"Memory ran out at {failure.size} samples at once of a batch longer than others, or when memory was"
            )
            reason += f" scarce; its samples run again at {new}, and others go on at {self._policy.size}."
            proposal = Proposal(failure.size, new, reason)
        else:
            proposal = self._policy.out_of_memory(failure.size)
        used, limit = self._ranks.maxima([self._memory.used_bytes(), -self._memory_forecast.limit_bytes])
        readings = {"used_gib": round(used / GIB, 4), "limit_gib": round(-limit / GIB, 4)}
        self.proposals.append(Proposal(proposal.old, proposal.new, proposal.reason, proposal.readings | readings))
        return proposal.new

    def _learn(self, step: Any, outcome: Outcome, length: int) -> None:
        beside = 0
        if step.zeroes_gradients and not step.ends_window:
            # The next batches of the accumulation window have the gradients so far beside their own.
            beside = sum(p.nbytes for p in self._module.parameters() if p.requires_grad)
        self._memory_forecast.learn(*_largest(outcome.pieces), beside_bytes=beside)
        self._longest = max(self._longest, length)

    def _learn_times(self, outcome: Outcome) -> None:
        if self._time_fit is not None:
            for number, seconds in outcome.seconds.items():
                self._time_fit.observe(outcome.pieces[number].size * outcome.pieces[number].length, seconds)

    def _say_cap(self, cap: float, is_scarce: bool, outlook: Forecast) -> None:
        """Records when a batch runs in smaller pieces than the size in force, and when that is over.

        A batch longer than those before it: once for each smaller cap. One like those before it: memory was taken; it
        is back when batches have fitted for a while. The arguments are the same on every rank.
        """
        size = self._policy.size
        if cap >= size:
            if self._calm is not None:
                self._calm += 1
            if self._calm == _CALM_STEPS:
                self._calm = None
                reason = f"Memory is back: {_CALM_STEPS} batches have fitted again at {size} samples at once."
                self.proposals.append(Proposal(self._scarce_size, size, reason))
            return
        if is_scarce:
            is_new, self._calm, self._scarce_size = self._calm is None, 0, int(cap)
            why = "Memory was taken: batches like those before run"
        else:
            is_new, self._smallest_cap = cap < self._smallest_cap, min(cap, self._smallest_cap)
            why = "A batch as long as this one runs"
        if is_new:
            reason = f"{why} at {int(cap)} samples at once: at {size} it would take"
            reason += f" {outlook.predicted_gib or 0:.2f} GiB of the {outlook.limit_gib or 0:.2f} GiB allowed."
            self.proposals.append(Proposal(size, int(cap), reason, outlook.readings))

    def _ask(self, outcome: Outcome, shape: BatchLayout | None, samples: int, seconds: float) -> None:
        most = int(outcome.maxima[0])
        rate = None
        measured = {}
        if self._policy.is_searching and not outcome.failures and most:
            seconds, highest = self._ranks.maxima([seconds, float(self._memory_forecast.peak_bytes)])
            rate = self._work(shape, samples) / max(1e-9, seconds)
            measured = {"peak_gib": round(highest / GIB, 4)} if highest else {}
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
        predicted = self._memory_forecast.peak(size, length)
        limit = self._memory_forecast.limit_bytes
        most, limit = self._ranks.maxima([-1.0 if predicted is None else predicted, -limit])
        return Forecast(None if most < 0 else most / GIB, -limit / GIB)


def _largest(pieces: list[Piece]) -> tuple[int, int]:
    """The samples and columns of the micro-batch that takes the most memory, as far as its tokens tell."""
    largest = max(pieces, key=lambda piece: piece.size * piece.length)
    return largest.size, largest.length
