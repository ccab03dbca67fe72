"""The callback that keeps the training step inside the memory there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from adaptrain import _lightning
from adaptrain._lightning.closure import wrap_closure
from adaptrain._lightning.evaluation import wrap_evaluation, wrap_transfer
from adaptrain.callbacks.base import AdaptiveCallback, find_run_folder
from adaptrain.callbacks.batch_size_checks import check_arguments, check_memory, check_training
from adaptrain.callbacks.global_batch_size import GlobalBatchSize
from adaptrain.decisions import Decision
from adaptrain.execution.engine import MicroBatching
from adaptrain.execution.evaluation import EvaluationBatching
from adaptrain.execution.forecast import MemoryForecast
from adaptrain.execution.memory import StepMemory
from adaptrain.execution.optimizer import guard_step
from adaptrain.execution.plan import Split
from adaptrain.execution.ranks import Ranks
from adaptrain.execution.transfer import Transfer
from adaptrain.policies.batch_size import MicroBatchSizePolicy, Proposal
from adaptrain.policies.evaluation_size import EvaluationSizePolicy
from adaptrain.policies.global_batch_size import GlobalBatchSizePolicy, global_batch_size_policy
from adaptrain.policies.peak_memory import PeakMemoryFit
from adaptrain.policies.piece_time import PieceTimeFit


class BatchSizeController(AdaptiveCallback):
    """Runs the loader's batch in micro-batches that fit into memory and are fast, whatever the loader's batch size.

    One optimizer step still sees exactly the loader's samples: the batch is split, each micro-batch's loss is weighted
    by its share, and the gradients add up to those of the whole batch. When memory runs out in forward or backward the
    same samples run again in smaller micro-batches, on every rank alike; in the optimizer's update, which is after
    them, it is tried once more where nothing was changed yet. The size is searched for: the smallest within 2% of the
    best measured throughput whose predicted memory fits. Every step runs in pieces that are predicted to fit at that
    moment: where a container would end the process without an error, prediction alone keeps it below the limit (its
    first step runs a 64th of the batch at once; larger sizes than were seen are expected to take a quarter more than
    the fit says), and memory that another process takes and gives back makes the pieces smaller and larger again. A
    batch that only `split` can cut is not predicted.

    Validation, test and predict steps run as Lightning runs them until memory runs out. Then the same samples run
    again in halves, and that stage remembers the size, which grows back slowly. What they return is put together in
    the loader's order (tensors, arrays and lists with a row per sample, also inside mappings and tuples; scalars as
    weighted means), logged values are weighted as in training, and a metric in the module counts each sample once.
    There each rank acts alone: a step that communicates itself must not be replayed on one of them (`self.log` with
    `sync_dist=True` may be used: it waits for the end of the step). An error in the transfer to the device is tried
    once more with memory freed; the batch itself must fit there. On the host, where a container ends the process
    without an error, a batch also runs in pieces where a training step of its size is predicted not to fit; before any
    training nothing is predicted.

    What is equal to the run without it, up to rounding: the gradients of losses that are means over samples or tokens,
    `outputs["loss"]`, values logged with `self.log` (a mean is weighted like the loss; `reduce_fx="sum"` values are
    taken to be counts and add up), and torchmetrics; in evaluation outputs too. What is not: dropout draws other masks;
    BatchNorm sees micro-batches (a warning names it); a loss that compares the samples of a batch with each other sees
    fewer; a value computed from a mean, such as the exponential of a loss, is averaged. Hooks around backward run once
    per micro-batch. Attributes of the module that a step changes itself are not taken back before a replay.

    The search goes by measured time, and so do the cuts of a batch that is sorted by length: where what a micro-batch
    costs beside its tokens, against the padding that is saved, is least in sum. So two runs may settle on different
    sizes and differ in rounding. For bit-reproducible runs give `micro_batch_size` as a number: the cuts are then even.

    Under data-parallel training no gradient is communicated before all ranks are done: they vote first, so that a rank
    that runs out of memory does not leave the others waiting. Reducing then does not overlap with backward; with
    `overlap=True` it does in the last micro-batch, as in DDP.

    Args:
        micro_batch_size: Samples at once: `"auto"`, or a number to begin with and to grow back to after an error.
        split_by: `"tokens"`: sort the batch by length and trim the padding of each micro-batch, where it has an
            `attention_mask`; or `"samples"`: keep the order and the padding.
        pad_to_multiple_of: Trims to lengths that are a multiple of this, as far as the batch has padding; `"auto"`: of
            8 where the trainer's precision is of 16 bits; None: to the longest sample.
        weight_by: How micro-batches are weighted: `"samples"`, `"tokens"` (labels that are not -100), `"auto"` (by
            tokens where there are integer `labels`, which is the same where none is -100), or a callable that
            returns the weight of a micro-batch. Under data-parallel training the weights are summed over the ranks.
        memory_limit_gib: The most this process may use, in GiB: resident memory on the host, tensors on a GPU. None:
            what there is.
        memory_fraction: The share of what there is that may be used, in (0, 1].
        split: Your own split: `(batch, micro_batch_size) -> sequence of micro-batches`, each sample in one of them.
        global_batch_size: Samples of one optimizer step, over all ranks and accumulated batches: None: the loader's; a
            number; or a policy: `BatchSizeRamp(...)`, `GradientNoiseScale(...)`. The loader's samples are then grouped
            anew, also in the middle of an epoch, each once an epoch. An integer `limit_train_batches` or
            `val_check_interval` keeps counting batches; a share of an epoch goes by samples. Changes are recorded and
            heard by `LearningRateController`; the size that training begins with is what the given rate belongs to. A
            schedule made for a number of steps does not know of later changes: let it go by epochs or by progress.
        overlap: With several ranks, reduce gradients while the last backward of an optimizer step runs. Use it where
            reducing takes long, as for a large model on a slow network, and memory is no close call. The ranks vote
            before it: running out of memory earlier is survived, and in it where no micro-batch of its size had fitted
            before. Else it is not deadlock-safe: the rank raises, the others wait until the process group's timeout. A
            parameter that a step does not use needs `find_unused_parameters=True`, as in DDP. No effect on one rank.
        dry_run: Record what would be proposed first, change nothing: running out of memory raises.
        name: Tells two of them apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range, or the trainer cannot be served.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int | Literal["auto"] = "auto",
        split_by: Literal["tokens", "samples"] = "tokens",
        pad_to_multiple_of: int | Literal["auto"] | None = "auto",
        weight_by: Literal["auto", "samples", "tokens"] | Callable[[Any], float] = "auto",
        memory_limit_gib: float | None = None,
        memory_fraction: float = 0.9,
        split: Split | None = None,
        global_batch_size: int | GlobalBatchSizePolicy | None = None,
        overlap: bool = False,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        fixed = check_arguments(
            micro_batch_size=micro_batch_size,
            split_by=split_by,
            pad_to_multiple_of=pad_to_multiple_of,
            weight_by=weight_by,
            memory_limit_gib=memory_limit_gib,
            memory_fraction=memory_fraction,
            split=split,
            overlap=overlap,
        )
        self.micro_batch_size = micro_batch_size
        self.split_by = split_by
        self.pad_to_multiple_of: int | Literal["auto"] | None = pad_to_multiple_of
        self.weight_by = weight_by
        self.memory_limit_gib = memory_limit_gib
        self.memory_fraction = memory_fraction
        self.split = split
        self.global_batch_size = global_batch_size
        self.overlap = overlap
        policy, kind = global_batch_size_policy(global_batch_size), type(self).__name__
        self._global = policy and GlobalBatchSize(policy, record=self._record_global, callback=kind, dry_run=dry_run)
        self._policy = MicroBatchSizePolicy(fixed=fixed)
        self._fit = PeakMemoryFit()
        # Times differ from run to run: where a number is given the cuts depend on the batch alone.
        self._time_fit = PieceTimeFit() if fixed is None else None
        self._machine: dict[str, Any] | None = None
        self._engine: MicroBatching | None = None
        self._least_frozen = math.inf  # layers, while memory was measured
        self._evaluation_policy = EvaluationSizePolicy()
        self._evaluation: EvaluationBatching | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses, before the stage begins, what cannot be served."""
        super().setup(trainer, pl_module, stage)
        _lightning.refuse_sharded(trainer, callback=type(self).__name__)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses what the seams cannot serve; takes over the training loader before anything asks for its length."""
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)
        if self._global is not None and (undo := self._global.setup(trainer)) is not None:
            self.on_exit(undo)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes over the closure."""
        super().on_fit_start(trainer, pl_module)
        noise = self._global is not None and self._global.measures_noise
        check_training(trainer, pl_module, overlap=self.overlap, measures_noise=noise, dry_run=self.dry_run)
        device = trainer.strategy.root_device
        memory = StepMemory(device, limit_gib=self.memory_limit_gib, fraction=self.memory_fraction)
        check_memory(memory, limit_gib=self.memory_limit_gib, fraction=self.memory_fraction)
        self._arrive(memory)
        self._engine = MicroBatching(
            pl_module,
            policy=self._policy,
            fit=self._fit,
            time_fit=self._time_fit,
            memory=memory,
            ranks=Ranks(device),
            by_length=self.split_by == "tokens",
            multiple=_lightning.pads_to(self.pad_to_multiple_of, trainer),
            weight_by=self.weight_by,
            split=self.split,
            measure_noise=noise,
            overlap=self.overlap,
            dry_run=self.dry_run,
        )
        self.on_exit(self._let_go)
        self.on_exit(wrap_closure(trainer, self._engine.run))
        if not self.dry_run:
            for optimizer in trainer.optimizers:
                self.on_exit(guard_step(optimizer))
        self._begin_evaluation(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Records the global batch size where it is not the loader's."""
        if self._global is not None:
            self._global.start(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Records a global batch size that holds from here on."""
        if self._global is not None:
            self._global.epoch_start(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Records what the step led to."""
        assert self._engine is not None
        for proposal in self._engine.proposals:
            self._record(trainer, proposal, {})
        self._engine.proposals = []
        if trainer.loggers and not self.dry_run:
            pl_module.log("adaptrain/micro_batch_size", float(self._engine.size))
        if self._global is not None:
            if trainer.loggers and not self.dry_run:
                pl_module.log("adaptrain/global_batch_size", float(self._global.size))
            self._global.batch_end(trainer, self._engine.noise, self._engine.samples)

    def _record_global(self, trainer: Any, proposal: Proposal, offer: bool) -> None:
        self._record(trainer, proposal, {}, knob="global_batch_size", offer=offer)

    def on_decision(self, trainer: Any, pl_module: Any, decision: Decision) -> None:
        """Measures anew when the structure has changed, and memory alone when more layers train than ever before."""
        if decision.knob == "frozen_layers":
            self._layers_frozen(decision)
        if decision.knob != "structure":
            return
        self._least_frozen = math.inf
        self._evaluation_policy.restart()
        if self._engine is not None:
            self._engine.forget()
        if self._global is not None:
            self._global.forget_speeds()

    def _layers_frozen(self, decision: Decision) -> None:
        if decision.step:  # steps were measured with as many as were frozen before
            self._least_frozen = min(self._least_frozen, decision.old)
        if decision.new < self._least_frozen and self._engine is not None:
            self._least_frozen = math.inf
            self._engine.forget_memory()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes over the steps, where no fit has."""
        self._begin_evaluation(trainer, pl_module)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_validation_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Records what the step led to."""
        if self._evaluation is None or not self._evaluation.proposals:
            return
        for stage, proposal in self._evaluation.proposals:
            self._record(trainer, proposal, {"stage": stage})
        self._evaluation.proposals = []

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def state_dict(self) -> dict[str, Any]:
        """Returns the size, the search and the measured memory, with the machine they hold for."""
        state = {
            "policy": self._policy.state_dict(),
            "evaluation": self._evaluation_policy.state_dict(),
            "fit": self._fit.state_dict(),
            "time_fit": self._time_fit and self._time_fit.state_dict(),
            "machine": self._machine,
        }
        return state if self._global is None else state | {"global": self._global.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on with them; on another machine it measures anew, starting with the same size."""
        self._policy.load_state_dict(state_dict["policy"])
        self._evaluation_policy.load_state_dict(state_dict["evaluation"])
        self._fit.load_state_dict(state_dict["fit"])
        if self._time_fit is not None and state_dict["time_fit"] is not None:
            self._time_fit.load_state_dict(state_dict["time_fit"])
        self._machine = state_dict["machine"]
        if self._global is not None and "global" in state_dict:
            self._global.load_state_dict(state_dict["global"])

    def _arrive(self, memory: StepMemory) -> None:
        """Forgets what was measured on another machine."""
        machine = memory.fingerprint()
        if self._machine is not None and self._machine != machine:
            self._policy.restart()
            self._evaluation_policy.restart()
            self._fit.clear()
            if self._global is not None:
                self._global.forget_speeds()
            if self._time_fit is not None:
                self._time_fit.clear()
        self._machine = machine

    def _begin_evaluation(self, trainer: Any, pl_module: Any) -> None:
        if self.dry_run:
            return
        if self._evaluation is not None:
            self._evaluation.begin()
            return
        find_run_folder(trainer)
        device = trainer.strategy.root_device
        memory = StepMemory(device, limit_gib=self.memory_limit_gib, fraction=self.memory_fraction)
        self._arrive(memory)
        self._evaluation = EvaluationBatching(
            pl_module,
            policy=self._evaluation_policy,
            weight_by=self.weight_by,
            split=self.split,
            report=memory.report,
            forecast=MemoryForecast(memory, self._fit) if memory.can_kill else None,
        )
        self._evaluation.begin()
        self.on_exit(self._let_go)
        self.on_exit(wrap_evaluation(trainer, pl_module, self._evaluation.run))
        self.on_exit(wrap_transfer(trainer, Transfer(memory.report)))

    def _let_go(self) -> None:
        self._engine = self._evaluation = None

    def _record(
        self,
        trainer: Any,
        proposal: Proposal,
        where: Mapping[str, str],
        knob: str = "micro_batch_size",
        offer: bool = True,
    ) -> None:
        readings = {**proposal.readings, **where}
        self.record(
            trainer, knob, old=proposal.old, new=proposal.new, reason=proposal.reason, readings=readings, offer=offer
        )
