"""A validation, test or predict step that does not run out of memory: whole while it fits, else in micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from adaptrain.errors import ConfigurationError
from adaptrain.execution.forecast import MemoryForecast
from adaptrain.execution.oom import DoesNotFitError, attempt, does_not_fit
from adaptrain.execution.plan import Plan, Split, make_plan
from adaptrain.execution.split import Piece, batch_size, copy_containers, elements_per_sample, layout
from adaptrain.execution.transaction import Transaction
from adaptrain.execution.weight import WeightBy
from adaptrain.policies.batch_size import Proposal
from adaptrain.policies.evaluation_size import EvaluationSizePolicy


class Step(Protocol):
    """What the runner needs of one batch's step; `_lightning.evaluation.EvaluationStep` is one."""

    batch: Any
    stage: str
    loader: int | None

    def forward(self, batch: Any) -> Any: ...  # noqa: D102
    def logged(self) -> Any: ...  # noqa: D102


class EvaluationBatching:
    """Runs evaluation's batches, and those that do not fit into memory in micro-batches.

    Unlike a training step, micro-batches of evaluation share nothing: only the one that ran out of memory is taken
    back and split further, and what was done stays done. So each rank acts alone, without a word to the others;
    values that are logged, and so may be reduced over the ranks, are logged once a batch, at its end, on every rank
    alike.

    The rows keep their order and their padding, so that outputs are those of the whole batch.

    Args:
        module: The module that is evaluated.
        policy: Decides the size.
        weight_by: See `adaptrain.execution.weight.sample_weights`; it weighs logged means and scalar outputs.
            Predictions are weighed by samples: they need no labels.
        split: The user's own split, or None.
        report: Returns a description of memory, for the error when a single sample does not fit.
        forecast: What training steps were seen to take, where a process is killed rather than told that memory ran
            out: a batch for which even a training step would fit runs whole, others in pieces for which it would. None:
            batches run whole until memory runs out.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        policy: EvaluationSizePolicy,
        weight_by: WeightBy = "auto",
        split: Split | None = None,
        report: Callable[[], str] = lambda: "",
        forecast: MemoryForecast | None = None,
    ) -> None:
        self.proposals: list[tuple[str, Proposal]] = []
        self._forecast = forecast
        self._smallest: dict[str, int] = {}  # by stage: the smallest pieces that were foreseen
        self._policy = policy
        self._weight_by: WeightBy = weight_by
        self._split = split
        self._report = report
        self._transaction = Transaction(module)

    def begin(self) -> None:
        """Begins a stage: the module's metrics and buffers may be others than before."""
        self._transaction.look()

    def run(self, step: Step) -> Any:
        """Runs one step; what is to be recorded waits in `proposals`, each with its stage.

        Args:
            step: The step.

        Returns:
            Its output: micro-batches' outputs put together as `Plan.join` does.

        Raises:
            DoesNotFitError: A single sample, or a batch that cannot be split, does not fit.
        """
        logged = step.logged()
        stage = step.stage if step.loader is None else f"{step.stage} (loader {step.loader})"
        with logged.capture():
            output = self._run(step, stage, logged)
        logged.flush()
        return output

    def _run(self, step: Step, stage: str, logged: Any) -> Any:
        to_do: list[tuple[Any, float]] = [(step.batch, 1.0)]
        done: list[tuple[int, float, Any]] = []
        ran_out = False
        while to_do:
            batch, weight = to_do.pop()
            size = self._size(stage, batch)
            if size is None:
                logged.next_piece(weight)
                self._transaction.keep()
                given, batch = batch, copy_containers(batch)
                output, message = attempt(lambda micro_batch=given: step.forward(micro_batch))
                if message is None:
                    if not (to_do or done):
                        return output
                    done.append((self._samples(batch), weight, output))
                    continue
                ran_out = True
                self._transaction.restore()
                logged.drop_piece()
                size = self._shrink(stage, batch, message)
            plan = self._plan(step.stage, batch, size)
            if len(plan.pieces) == 1:
                raise ConfigurationError(
                    f"split returned one micro-batch for a batch of {self._samples(batch)} samples and micro_batch_size"
                    f"={size}. It must return micro-batches of at most that many samples."
                )
            pieces = [(micro_batch, weight * share) for _, micro_batch, share in plan.every()]
            to_do.extend(reversed(pieces))
        if (
            not ran_out
            and self._policy.limits(stage)
            and (proposal := self._policy.succeeded(stage, self._elements(step.batch)))
        ):
            self.proposals.append((stage, proposal))
        return _join(done)

    def _size(self, stage: str, batch: Any) -> int | None:
        """Samples at once for a batch, or None where it runs whole."""
        samples = self._samples(batch)
        size = self._foreseen(stage, batch, samples)
        if self._policy.limits(stage):
            size = min(size, self._policy.size(stage, self._elements(batch)))
        return None if samples <= size else size

    def _foreseen(self, stage: str, batch: Any, samples: int) -> int:
        shape = None if self._split is not None or self._forecast is None else layout(batch, by_length=False)
        if shape is None or self._forecast is None:
            return samples
        self._forecast.look(samples, shape.length)
        most = self._forecast.most(samples, shape.length)
        if most < min(samples, self._smallest.get(stage, samples)):
            self._smallest[stage] = most
            reason = f"{samples} samples of {shape.length} columns may not fit, as training has shown: {most} at once."
            self.proposals.append((stage, Proposal(samples, most, reason)))
        return most

    def _samples(self, batch: Any) -> int:
        if self._split is not None:
            return len(self._split(batch, 1))  # its batches may hold more than samples
        return batch_size(batch) or 1

    def _elements(self, batch: Any) -> int:
        return 1 if self._split is not None else elements_per_sample(batch)

    def _shrink(self, stage: str, batch: Any, message: str) -> int:
        failed = self._samples(batch)
        if failed <= 1:
            can_split = self._split is not None or batch_size(batch) is not None
            shape = layout(batch, by_length=False)
            raise DoesNotFitError(does_not_fit(shape, can_split, self._report(), message, stage=stage))
        proposal = self._policy.out_of_memory(stage, failed, self._elements(batch))
        self.proposals.append((stage, proposal))
        return proposal.new

    def _plan(self, stage: str, batch: Any, size: int) -> Plan:
        shape = None if self._split is not None else layout(batch, by_length=False)
        weight_by = (lambda part: float(self._samples(part))) if stage == "predict" else self._weight_by
        return make_plan(batch, shape, size, weight_by=weight_by, split=self._split)


def _join(done: list[tuple[int, float, Any]]) -> Any:
    pieces, first = [], 0
    for samples, _, _ in done:
        pieces.append(Piece((first, first + samples), None, 1))
        first += samples
    plan = Plan(lambda: iter(()), [weight for _, weight, _ in done], pieces)
    return plan.join([(number, output) for number, (_, _, output) in enumerate(done)])
