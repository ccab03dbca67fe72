"""One training step in micro-batches, replayed smaller when memory runs out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adaptrain.execution.embedding import SparseAccumulation
from adaptrain.execution.noise import NoiseProbe
from adaptrain.execution.oom import DoesNotFitError, attempt, does_not_fit, release_memory
from adaptrain.execution.overlap import LastBackwardError, ProvenSizes
from adaptrain.execution.plan import Plan, Split, make_plan
from adaptrain.execution.ranks import Ranks
from adaptrain.execution.split import BatchLayout, Piece
from adaptrain.execution.transaction import Transaction
from adaptrain.execution.weight import WeightBy

# The loss, the other outputs by micro-batch, and the last micro-batch's loss where its backward is still to come.
_Computed = tuple[Tensor | None, list[tuple[int, dict[str, Any]]], Tensor | None]


class Step(Protocol):
    """What the runner needs of one batch's step; `_lightning.closure.ClosureStep` is one."""

    batch: Any
    zeroes_gradients: bool
    ends_window: bool

    def forward(self, batch: Any) -> Any: ...  # noqa: D102
    def zero_grad(self) -> None: ...  # noqa: D102
    def backward(self, loss: Tensor) -> None: ...  # noqa: D102
    def backward_and_reduce(self, loss: Tensor) -> None: ...  # noqa: D102
    def reduced_without_ddp(self) -> None: ...  # noqa: D102
    def result(self, loss: Tensor | None, extra: dict[str, Any]) -> Any: ...  # noqa: D102
    def logged(self) -> Any: ...  # noqa: D102
    def local(self) -> contextlib.AbstractContextManager[None]: ...  # noqa: D102


@dataclass(frozen=True)
class Failure:
    """An attempt that some rank could not finish.

    Args:
        size: Samples at once in the attempt, on the rank where they were most.
        message: The first line of this rank's error; empty where only another rank ran out.
        maxima: The largest of all ranks' `notes`, in the order they were given.
    """

    size: int
    message: str
    maxima: Sequence[float] = ()


@dataclass(frozen=True)
class Outcome:
    """How a step went.

    Args:
        result: What goes back to Lightning.
        pieces: The micro-batches that ran.
        failures: The attempts before, in order.
        maxima: The largest of all ranks' `notes`, in the order they were given.
        seconds: Of each micro-batch's forward and backward pass, where they were timed; by its place in `pieces`.
    """

    result: Any
    pieces: list[Piece]
    failures: list[Failure]
    maxima: list[float]
    seconds: dict[int, float] = field(default_factory=dict)


class StepRunner:
    """Runs a batch as micro-batches whose gradients add up to the whole batch's.

    Each micro-batch's loss is multiplied by its share of the batch's weight, so that for a loss that is a mean over
    samples or tokens the gradient is that of the unsplit step, up to rounding. With token weights under
    data-parallel training the whole is what all ranks hold, as if one process had seen the global batch. Dropout
    draws other masks than in the unsplit step: there the two are equal in distribution only.

    With `overlap` the ranks vote before the last backward of a window, and it reduces the gradients as they come. It
    cannot be taken back; so where that micro-batch is larger, on any rank, than what has fitted before, its backward
    runs alone and the ranks vote once more.

    Args:
        module: The module that is trained.
        ranks: The ranks of the run.
        overlap: Reduce gradients while the last backward runs.
        weight_by: See `sample_weights`; or a callable that returns the weight of a micro-batch.
        split: `split(batch, micro_batch_size)` returns micro-batches; None: by the batch's layout.
        report: Returns a description of memory, for the error when a single sample does not fit.
        noise: Takes gradient norms on the way; None: none are taken.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        ranks: Ranks,
        weight_by: WeightBy = "auto",
        split: Split | None = None,
        report: Callable[[], str] = lambda: "",
        noise: NoiseProbe | None = None,
        overlap: bool = False,
    ) -> None:
        self._module = module
        self._noise = noise
        self._ranks = ranks
        self._weight_by: WeightBy = weight_by
        self._split = split
        self._report = report
        self._transaction = Transaction(module)
        self._zeroed = False
        self._embeddings = SparseAccumulation(module)
        self._seconds: dict[int, float] = {}
        self._overlap = overlap and ranks.count > 1
        self.proven = ProvenSizes()

    def run(
        self,
        step: Step,
        layout: BatchLayout | None,
        micro_batch_size: int,
        *,
        shrink: Callable[[Failure], int],
        notes: Sequence[float] = (),
        timed: bool = False,
    ) -> Outcome:
        """Runs one step, again and smaller for as long as memory runs out on any rank.

        Args:
            step: The step.
            layout: The batch's layout; None where it cannot be split and runs whole.
            micro_batch_size: Samples at once.
            shrink: Asked after a failed attempt for the samples at once of the next; the same on every rank.
            notes: Numbers of this rank whose maximum over the ranks the caller wants, without another collective.
            timed: Time every micro-batch; a CUDA device is waited for.

        Returns:
            The outcome.

        Raises:
            DoesNotFitError: A single sample, or a batch that cannot be split, does not fit.
            LastBackwardError: Memory ran out on this rank while gradients were reduced.
        """
        can_split = layout is not None or self._split is not None
        failures: list[Failure] = []
        hold_last = self._overlap and step.ends_window
        self._zeroed = False
        self._transaction.begin(hold_gradients=not step.zeroes_gradients)
        try:
            while True:
                plan = make_plan(
                    step.batch,
                    layout,
                    micro_batch_size,
                    weight_by=self._weight_by,
                    split=self._split,
                    weigh_whole=self._ranks.count > 1,
                )
                logged = step.logged()
                scale = self._scale(plan)
                done, message = self._attempt(step, plan, scale, logged, hold_last=hold_last, timed=timed)
                is_new = hold_last and not self.proven.covers(plan.pieces[_last_that_counts(plan)])
                ran_out, largest, any_new, *maxima = self._ranks.maxima(
                    [message is not None, plan.largest, is_new, *notes]
                )
                if any_new and not ran_out:
                    done, message = self._last_backward(step, done, logged)
                    ran_out = self._ranks.maxima([message is not None])[0]
                if not ran_out:
                    break
                done = None
                release_memory()
                self._transaction.rollback()
                self.proven.clear()
                if not can_split or min(largest, micro_batch_size) <= 1:
                    raise DoesNotFitError(does_not_fit(layout, can_split, self._report(), message))
                failures.append(Failure(int(largest), message or "", maxima))
                shrunk = shrink(failures[-1])
                # A rank may run fewer samples at once than the others: no more than that, and half where it ran out.
                most = micro_batch_size if message is None else max(1, plan.largest // 2)
                micro_batch_size = min(shrunk, most)
        except BaseException:
            self._transaction.abort()
            raise
        self._transaction.commit()
        own = 0.0
        if self._noise is not None:
            own = self._noise.before_average(
                sum(piece.size for piece in plan.pieces),
                begins_window=step.zeroes_gradients,
                ends_window=step.ends_window,
                scale=scale,
            )
        loss, outputs, held = done or (None, [], None)
        if held is not None:
            self._reduce(step, held, logged)
        self.proven.add(plan.pieces)
        if step.ends_window:
            self.proven.stepped()
            if held is None:
                self._ranks.average_gradients(self._module.parameters())
                if self._overlap:
                    step.reduced_without_ddp()
            if self._noise is not None:
                self._noise.after_average(own)
        logged.flush()
        return Outcome(step.result(loss, plan.join(outputs)), plan.pieces, failures, maxima, self._seconds)

    def _scale(self, plan: Plan) -> float:
        """The factor from a share of this rank's weight to a share of all ranks', before ranks are averaged."""
        if self._ranks.count == 1 or self._weight_by == "samples":
            return 1.0
        everyone = self._ranks.sums([plan.total])[0]
        return self._ranks.count * plan.total / everyone

    def _attempt(
        self, step: Step, plan: Plan, scale: float, logged: Any, *, hold_last: bool, timed: bool
    ) -> tuple[_Computed | None, str | None]:
        """Returns what was computed, or the out-of-memory error's message."""
        with step.local() if self._ranks.count > 1 else contextlib.nullcontext(), logged.capture():
            return attempt(lambda: self._micro_batches(step, plan, scale, logged, hold_last=hold_last, timed=timed))

    def _last_backward(self, step: Step, done: _Computed | None, logged: Any) -> tuple[_Computed | None, str | None]:
        """Runs the backward that was held back by itself, so that it can still be taken back."""
        assert done is not None
        loss, outputs, held = done
        assert held is not None
        with step.local(), logged.capture():
            _, message = attempt(lambda: step.backward(held))
        return ((loss, outputs, None), None) if message is None else (None, message)

    def _reduce(self, step: Step, held: Tensor, logged: Any) -> None:
        """Runs the backward that was held back; after it every rank has the gradients' mean."""
        with logged.capture():
            _, message = attempt(lambda: step.backward_and_reduce(held))
        if message is not None:
            raise LastBackwardError(self._report(), message)

    def _micro_batches(
        self, step: Step, plan: Plan, scale: float, logged: Any, *, hold_last: bool, timed: bool
    ) -> _Computed:
        total: Tensor | None = None
        outputs = []
        held: Tensor | None = None
        last = _last_that_counts(plan) if hold_last else None
        self._seconds = {}
        if self._noise is not None:
            self._noise.begin()
        for number, micro_batch, share in plan:
            logged.next_piece(share)
            began = self._clock() if timed else 0.0
            # What the step before has left is zeroed after the first forward pass: there is nothing to add to yet.
            with self._embeddings.adding() if self._zeroed else contextlib.nullcontext():
                output = step.forward(micro_batch)
                if not self._zeroed:
                    # As Lightning does, between forward and backward; once: an attempt taken back leaves no gradient.
                    step.zero_grad()
                    self._zeroed = True
                if output.closure_loss is None:
                    if number == last:
                        raise RuntimeError("training_step returned None. With overlap=True it must return a loss.")
                    continue
                factor = share * scale
                weighted = output.closure_loss if factor == 1.0 else output.closure_loss * factor
                if number == last:
                    held = weighted
                else:
                    step.backward(weighted)
            if timed and number != last:
                self._seconds[number] = self._clock() - began
            loss = output.loss if share == 1.0 else output.loss * share
            total = loss if total is None else total + loss
            outputs.append((number, output.extra))
            if self._noise is not None:
                self._noise.micro_batch(plan.pieces[number].size, share)
        if self._noise is not None:
            self._noise.batch(sum(piece.size for piece in plan.pieces))
        return total, outputs, held

    def _clock(self) -> float:
        if torch.device(self._ranks.device).type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return time.perf_counter()


def _last_that_counts(plan: Plan) -> int:
    """The number of the last micro-batch that runs."""
    return max(number for number, share in enumerate(plan.shares) if share)
