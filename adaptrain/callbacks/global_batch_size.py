"""How `BatchSizeController` changes the global batch size: policy in, loader seam out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from adaptrain import _lightning
from adaptrain._lightning.loader import ResizableLoader, loader_batch_size
from adaptrain.errors import ConfigurationError
from adaptrain.execution.noise import NoiseSample
from adaptrain.policies.batch_size import Proposal
from adaptrain.policies.global_batch_size import GlobalBatchSizePolicy
from adaptrain.policies.noise_scale import GradientNoiseScale

_SILENT = 100  # batches without a measurement before a warning


class GlobalBatchSize:
    """The samples of one optimizer step: per batch of the loader × accumulated batches × ranks.

    A batch that workers have taken ahead keeps its size, and so does an accumulation window that has begun. A change
    is therefore recorded, and offered to the other callbacks, when the first batch of the new size is next.

    Args:
        policy: Decides.
        record: Records a change: `record(proposal, offer)`; not offered is the size that training begins with.
        callback: The callback's class name, for messages.
        dry_run: Change nothing.
    """

    def __init__(
        self,
        policy: GlobalBatchSizePolicy,
        *,
        record: Callable[[Any, Proposal, bool], None],
        callback: str,
        dry_run: bool,
    ) -> None:
        self._policy = policy
        self._record = record
        self._callback = callback
        self._dry_run = dry_run
        self._seam: ResizableLoader | None = None
        self._unit = 1
        self._size = 0
        self._pending: tuple[int, Proposal] | None = None
        self._is_loaded = False
        self._unmeasured = 0
        self._began: float | None = None  # when the step under way did
        self._samples = 0  # of this rank, in it

    def setup(self, trainer: Any) -> Callable[[], None] | None:
        """Takes over the training loader, before anything asks for its length.

        Returns:
            What gives it back; None in a dry run.

        Raises:
            ConfigurationError: A size cannot be divided among ranks and accumulated batches.
        """
        self._is_loaded, self._unmeasured, self._began = False, 0, None
        self._unit = trainer.world_size * trainer.accumulate_grad_batches
        if any(hasattr(callback, "going_to_accumulate_grad_batches") for callback in trainer.callbacks):
            raise ConfigurationError(
                f"{self._callback}: global_batch_size does not go with GradientAccumulationScheduler, which changes"
                " the samples of a step too. Use accumulate_grad_batches with one number, or BatchSizeRamp(...) alone."
            )
        for name, size in self._policy.sizes.items():
            if size % self._unit:
                below, above = size // self._unit * self._unit, -(-size // self._unit) * self._unit
                fix = f"{below} or {above}" if below else f"{above}"
                raise ConfigurationError(
                    f"{self._callback}: {name}={size} samples of one step must be a multiple of"
                    f" {self._unit}: {trainer.world_size} ranks times accumulate_grad_batches="
                    f"{trainer.accumulate_grad_batches}. Use {fix}."
                )
        if self._dry_run:
            return None
        self._seam = ResizableLoader(
            trainer,
            first=lambda size: self._policy.first(size * self._unit) // self._unit,
            gather=_lightning.all_gather,
            callback=self._callback,
        )
        return self._seam.install()

    def start(self, trainer: Any) -> None:
        """Records the size that training begins with, where it is not the loader's. A resumed run goes on."""
        if self._seam is None:
            loaders = loader_batch_size(trainer.train_dataloader, callback=self._callback) * self._unit
            first = self._policy.first(loaders)
        else:
            loaders, first = self._seam.loaders_size * self._unit, self._seam.sampler.batch_size * self._unit
        if self._is_loaded:
            self._is_loaded = False
            return
        self._size, self._pending = first, None
        if first != loaders:
            reason = f"Training begins with {first} samples per optimizer step in place of the loader's {loaders}."
            self._record(trainer, Proposal(loaders, first, reason), False)

    @property
    def size(self) -> int:
        """Samples of the next optimizer step, over all ranks."""
        return self._size

    def epoch_start(self, trainer: Any) -> None:
        """A change that was to come in the last epoch holds from the first batch of this one."""
        self._began, self._samples = time.perf_counter(), 0
        if self._pending is not None:
            self._apply(trainer)

    @property
    def measures_noise(self) -> bool:
        """Whether the policy wants gradient norms."""
        return isinstance(self._policy, GradientNoiseScale)

    def batch_end(self, trainer: Any, noise: NoiseSample | None = None, samples: int = 0) -> None:
        """Asks the policy where the optimizer has stepped, and records a change that is next.

        Args:
            trainer: The trainer, in `on_train_batch_end`.
            noise: The step's gradient norms, where they could be taken.
            samples: This rank's samples in the batch.
        """
        if isinstance(self._policy, GradientNoiseScale):
            self._observe(self._policy, trainer, noise)
            self._time(self._policy, trainer, samples)
        if self._seam is not None:
            self._seam.batch_done()
        if not _lightning.at_step_boundary(trainer):
            return
        if self._pending is None:
            self._ask(trainer)
        if self._pending is not None and (self._seam is None or self._seam.trained >= self._pending[0]):
            self._apply(trainer)

    def _observe(self, policy: GradientNoiseScale, trainer: Any, noise: NoiseSample | None) -> None:
        if noise is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            # What Lightning's loss was divided by, and a scaler's factor, are no part of the gradient.
            factor = trainer.accumulate_grad_batches / (scaler.get_scale() if scaler is not None else 1.0)
            policy.observe(
                small=noise.small,
                small_squared_norm=noise.small_squared_norm * factor**2,
                big=noise.big,
                big_squared_norm=noise.big_squared_norm * factor**2,
            )
        self._unmeasured = 0 if noise is not None else self._unmeasured + 1
        if self._unmeasured == _SILENT and not self._dry_run:
            warnings.warn(
                f"GradientNoiseScale could measure nothing in the last {_SILENT} batches: each ran in one micro-batch"
                " on one rank. Give BatchSizeController a micro_batch_size below the loader's batch size.",
                stacklevel=2,
            )

    def _time(self, policy: GradientNoiseScale, trainer: Any, samples: int) -> None:
        """Measures a step from the end of the one before, so that waiting for the loader counts."""
        self._samples += samples
        if policy.slowdown is None or not _lightning.at_step_boundary(trainer):
            return
        now, began, counted = time.perf_counter(), self._began, self._samples
        self._began, self._samples = now, 0
        # Until a change holds, steps are still of the old size, and the policy asks for those of the new one.
        if began is None or self._pending is not None:
            return
        speeds = [counted / max(1e-9, now - began)]
        policy.observe_speed(_lightning.all_reduce(speeds, op="sum", device=trainer.strategy.root_device)[0])

    def forget_speeds(self) -> None:
        """Measures speed anew: the model's structure, or the machine, is another one."""
        if isinstance(self._policy, GradientNoiseScale):
            self._policy.forget_speeds()

    def _ask(self, trainer: Any) -> None:
        proposal = self._policy.next(self._size, progress=_lightning.progress(trainer), unit=self._unit)
        if proposal is None:
            return
        start: int | None = 0
        if self._seam is not None:
            start = self._seam.resize(proposal.new // self._unit)
            if start is None:
                return
            ahead = start - self._seam.trained
            if ahead:
                proposal = Proposal(proposal.old, proposal.new, proposal.reason, proposal.readings | {"ahead": ahead})
        self._policy.changed()
        self._pending = (start, proposal)

    def _apply(self, trainer: Any) -> None:
        assert self._pending is not None
        proposal = self._pending[1]
        self._size, self._pending = proposal.new, None
        self._record(trainer, proposal, True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the policy's state, the size, and a change that is still to come."""
        pending = self._pending and [self._pending[0], vars(self._pending[1])]
        return {"policy": self._policy.state_dict(), "size": self._size, "pending": pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with them; where batches are grouped is in the loader's own state."""
        self._is_loaded = True
        self._policy.load_state_dict(state["policy"])
        self._size = int(state["size"])
        self._pending = (state["pending"][0], Proposal(**state["pending"][1])) if state["pending"] else None
