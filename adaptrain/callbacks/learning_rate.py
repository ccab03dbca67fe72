"""Multiplies whatever optimizer and scheduler there is by a rate that adapts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from adaptrain import _lightning
from adaptrain._lightning.step_loss import tell_step_loss
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.decisions import Decision
from adaptrain.errors import ConfigurationError
from adaptrain.execution.host_snapshot import HostSnapshot
from adaptrain.execution.rate_hook import RateHook
from adaptrain.execution.step_sensor import StepSensor
from adaptrain.execution.update_probe import sets_own_rate, update_kind, were_trained, why_off
from adaptrain.policies.learning_rate import Guard, Journal, MetricPlateau, Multiplier, Signal
from adaptrain.policies.learning_rate.build import build_multiplier, check_cap, check_switches, metric_mode


class LearningRateController(AdaptiveCallback):
    """Robust to the learning rate that was typed, whatever the optimizer and the scheduler.

    Just before each optimizer step every group's rate is multiplied, and just after it put back, so the scheduler
    (any, or none) sees its own rate and nothing compounds. The multiplier is the product of the factors below; each
    is a policy in `adaptrain.policies.learning_rate` with its formula and source. A rate that moved is recorded with
    the factor that moved it, and the effective rate is logged as `adaptrain/lr/<group>` beside
    `adaptrain/lr_multiplier`.

    Decoupled weight decay (AdamW) is lr·decay, so it scales with the multiplier as well. A skipped step changes no
    weight and no optimizer state, but counts as a step for Lightning and the scheduler. The guard keeps a copy of
    weights and optimizer state in host memory; it is not in the checkpoint, a resumed run takes a new one at its
    first step. Optimizers that set their own rate (schedule-free, Prodigy, D-Adaptation) get the guard alone; those
    whose direction cannot be read (SGD without momentum, Lion, Adafactor, ...) go without align and cap. Both are
    recorded once.

    Args:
        align: Raise a rate that is too low.
        cap: Limit a step that is too long: one that changes a typical weight matrix by more than 13% of its singular
            values' root mean square, and up to four times that while gradients agree for sure; or by 0.8% where the
            weights were trained before, as told by biases and norms that are not all alike. A number is a limit of
            your own, such as 0.13 to go on with pretraining, and never gives way.
        plateau: Halve where the loss stands still. `"auto"`: while the scheduler's rate stands still too; True: always;
            False: never.
        recover: Raise the rate for a while after the model was pruned late in its schedule.
        guard: Skip non-finite steps and spikes; roll back where training diverged, at most 3 times.
        batch_scaling: With the global batch size the rate scales by its root (`"sqrt"`), in proportion (`"linear"`),
            by AdaScale's gain from the noise scale that `GradientNoiseScale` measured and in proportion where none was
            (`"adascale"`), or not (None). `"auto"`: the root for Adam and its kin, AdaScale for others.
        monitor: A validation metric that plateau watches instead of the training loss, such as `"val/loss"`.
        mode: Whether a lower (`"min"`) or higher (`"max"`) `monitor` is better; `"auto"`: told by its name.
        dry_run: Decide and record, change nothing.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is not one of its values.
    """

    def __init__(
        self,
        *,
        align: bool = True,
        cap: bool | float = True,
        plateau: bool | Literal["auto"] = "auto",
        recover: bool = True,
        guard: bool = True,
        batch_scaling: Literal["auto", "sqrt", "linear", "adascale"] | None = "auto",
        monitor: str | None = None,
        mode: Literal["auto", "min", "max"] = "auto",
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        check_switches(
            align=align, plateau=plateau, recover=recover, guard=guard, batch_scaling=batch_scaling, mode=mode
        )
        check_cap(cap)
        self.align = align
        self.cap = cap
        self.plateau: bool | Literal["auto"] = plateau
        self.recover = recover
        self.guard = guard
        self.batch_scaling = batch_scaling
        self.monitor = monitor
        self.mode = mode if monitor is None or mode != "auto" else metric_mode(monitor)
        self._loaded: dict[str, Any] = {}
        self._multiplier: Multiplier | None = None
        self._journal = Journal()
        self._sensor = StepSensor(probes=False, gradients=guard)
        self._snapshot: HostSnapshot | None = None
        self._hook: RateHook | None = None
        self._window: list[torch.Tensor] = []
        self._recovery_window = 0

    @property
    def multiplier(self) -> float:
        """What the scheduler's rate is multiplied by at present."""
        return 1.0 if self._multiplier is None else self._multiplier.value

    @property
    def factors(self) -> dict[str, float]:
        """The multiplier's factors by name."""
        return {} if self._multiplier is None else self._multiplier.factors

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses manual optimization and sharded parameters."""
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Builds the policies for the optimizer there is and hooks into its step."""
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError(
                "LearningRateController does not serve LBFGS: it runs the closure several times in one step."
                " Use a first-order optimizer such as AdamW, or leave this callback out."
            )
        if not optimizer.param_groups:
            raise ConfigurationError(
                f"There is no rate to control: {type(pl_module).__name__}.configure_optimizers returned no optimizer."
                " Return one, or leave LearningRateController out."
            )
        self._multiplier = build_multiplier(
            kind=update_kind(optimizer),
            own_rate=sets_own_rate(optimizer),
            align=self.align,
            cap=self.cap,
            trained=were_trained(p for group in optimizer.param_groups for p in group["params"]),
            plateau=self.plateau,
            recover=self.recover,
            guard=self.guard,
            batch_scaling=self.batch_scaling,
            metric=None if self.monitor is None else ("min" if self.mode == "min" else "max"),
        )
        probes = self._multiplier.align is not None or self._multiplier.cap is not None
        self._sensor = StepSensor(probes=probes, gradients=self.guard)
        total = _lightning.total_steps(trainer)
        self._recovery_window = min(500, max(20, total // 20)) if total else 200
        self._journal = Journal(gap=max(20, (total or 0) // 50))
        self._snapshot, self._window = None, []
        if loaded := self._loaded:
            self._loaded = {}
            self._multiplier.load_state_dict(loaded["multiplier"])
            self._journal.load_state_dict(loaded["journal"])
            self._sensor.references, self._sensor.steps = loaded["references"], loaded["steps"]
        self._hook = RateHook(optimizer)
        self.on_exit(self._hook.remove)
        self.on_exit(tell_step_loss(trainer, self._tell))
        wanted = [name for name in ("align", "cap") if getattr(self, name)]
        if not loaded and wanted and (reason := why_off(optimizer, wanted)) is not None:
            self.record(trainer, "learning_rate", old=1.0, new=1.0, reason=reason)

    # One optimizer step -----------------------------------------------------------------------------------------

    def _tell(self, loss: Any) -> None:
        if loss is not None:
            self._window.append(loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps the losses of an accumulation window; its last one was told before the step."""
        if _lightning.at_step_boundary(trainer):
            self._window = []
        elif isinstance(outputs, dict) and outputs.get("loss") is not None:
            self._window.append(outputs["loss"])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Judges the step that is about to be taken, and multiplies its rate or skips it."""
        multiplier, hook = self._multiplier, self._hook
        assert multiplier is not None
        assert hook is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        signal = self._sense(trainer, pl_module, optimizer)
        if scaler is not None and not signal.gradients_finite and math.isfinite(signal.loss or 0.0):
            return  # the scaler skips this step itself and lowers its scale: its way of working, not a fault
        old, verdict = multiplier.value, multiplier.step(signal)
        if verdict == "accept":
            self._keep(multiplier.guard, pl_module, optimizer, scaler, signal.loss)
            move = self._journal.observe(int(trainer.global_step), multiplier.value, multiplier.factors)
            if move is not None:
                self._record(trainer, old=move[0], new=multiplier.value, reason=move[1], signal=signal)
        elif verdict == "diverged":
            self._roll_back(trainer, pl_module, optimizer, scaler, signal)
        else:
            what = "the loss or a gradient is not finite" if verdict == "non_finite" else "the loss is a spike"
            self._record(trainer, old=old, new=0.0, reason=f"guard: {what}; the step is skipped", signal=signal)
        if verdict != "accept" and not self.dry_run:
            self._skip(pl_module, optimizer)
        self._log(trainer, optimizer)
        if not self.dry_run:
            hook.factor = multiplier.value
            hook.multiply()

    def _sense(self, trainer: Any, pl_module: Any, optimizer: Any) -> Signal:
        """Measures the step; one reduction makes all ranks see the same numbers."""
        scale = trainer.accumulate_grad_batches / max(1, len(self._window))  # an epoch's last window may be shorter
        each = self._multiplier is not None and self._multiplier.is_searching
        vector, probed = self._sensor.read(optimizer, self._window, scale=scale, each=each)
        loss, finite, *probes = _lightning.all_reduce(vector, device=pl_module.device)
        cosine, ratio = (None if math.isnan(value) else value for value in probes)
        return Signal(
            loss=loss if self._window else None,
            rate=max(float(group["lr"]) for group in optimizer.param_groups),
            base=_base_rate(optimizer.param_groups),
            gradients_finite=finite == 1,
            probed=probed,
            cosine=cosine,
            ratio=ratio,
        )

    def _keep(self, guard: Guard | None, pl_module: Any, optimizer: Any, scaler: Any, loss: float | None) -> None:
        """Snapshots the weights that have just given an ordinary loss; the first ones in any case."""
        if guard is None or self.dry_run or loss is None:
            return
        due = guard.snapshot_due(loss)
        if due:
            guard.kept()
        if due or self._snapshot is None:
            self._snapshot = self._snapshot or HostSnapshot()
            self._snapshot.take(pl_module, optimizer, scaler)

    def _skip(self, pl_module: Any, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self._snapshot is not None:
            self._snapshot.restore_buffers(pl_module)

    def _roll_back(self, trainer: Any, pl_module: Any, optimizer: Any, scaler: Any, signal: Signal) -> None:
        multiplier = self._multiplier
        assert multiplier is not None
        assert multiplier.guard is not None
        guard = multiplier.guard
        if guard.exhausted and self.dry_run:
            return
        fits = self._snapshot is not None and self._snapshot.fits(pl_module, optimizer)
        if not self.dry_run and (guard.exhausted or not fits):
            tried = f"after {guard.done} rollbacks" if guard.exhausted else "before the first finite step"
            raise RuntimeError(
                f"Training diverged at step {trainer.global_step}, {tried}: loss {signal.loss}, gradients"
                f" {'finite' if signal.gradients_finite else 'not finite'}, learning rate {signal.rate:.3g} times"
                f" {multiplier.value:.3g}. Look for values in the data that are not finite or far too large,"
                " lower the learning rate, or train in higher precision."
            )
        old = multiplier.value
        if self._snapshot is not None and not self.dry_run:
            self._snapshot.restore(pl_module, optimizer, scaler)
        multiplier.rolled_back()
        reason = f"guard: training diverged; back to the last good weights (rollback {guard.done} of {guard.rollbacks})"
        self._record(trainer, old=old, new=multiplier.value, reason=reason, signal=signal)

    # What others report -----------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Shows the plateau policy the monitored metric."""
        plateau = None if self._multiplier is None else self._multiplier.plateau
        if trainer.sanity_checking or not isinstance(plateau, MetricPlateau):
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(map(str, trainer.callback_metrics))) or "none"
            raise ConfigurationError(
                f"LearningRateController watches monitor={self.monitor!r}, which is not logged. Logged are: {known}."
            )
        metric = float(trainer.callback_metrics[self.monitor])
        plateau.observe(_lightning.all_reduce([metric], device=pl_module.device)[0])

    def on_decision(self, trainer: Any, pl_module: Any, decision: Decision) -> None:
        """Opens a recovery window after pruning, and follows the global batch size."""
        if self._multiplier is None:
            return
        if decision.knob == "structure":
            removed = float(decision.readings.get("removed", 0.0))
            self._multiplier.structure_changed(removed, window=self._recovery_window)
            self._sensor.references, self._snapshot = None, None
        elif decision.knob == "global_batch_size":
            self._multiplier.batch_changed(decision.old, decision.new, noise_scale=_noise_scale(decision.readings))

    # The record -------------------------------------------------------------------------------------------------

    def _record(self, trainer: Any, *, old: float, new: float, reason: str, signal: Signal) -> None:
        readings = {"loss": signal.loss, "scheduler_lr": signal.rate, "update_ratio": signal.ratio}
        multiplier = self._multiplier
        align, cap = (None, None) if multiplier is None else (multiplier.align, multiplier.cap)
        readings |= {"cosine": align and align.cosine, "cap_limit": cap and cap.limit}
        self.record(trainer, "learning_rate", old=old, new=new, reason=reason, readings=readings | self.factors)

    def _log(self, trainer: Any, optimizer: Any) -> None:
        step = int(trainer.global_step)
        if not trainer.loggers or (step + 1) % trainer.log_every_n_steps:
            return
        metrics = {"adaptrain/lr_multiplier": self.multiplier}
        for index, group in enumerate(optimizer.param_groups):
            rate = float(group["lr"]) * (1.0 if self.dry_run else self.multiplier)
            metrics[f"adaptrain/lr/{group.get('name', index)}"] = rate
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def state_dict(self) -> dict[str, Any]:
        """Returns the policies' state as plain Python."""
        if self._multiplier is None:
            return self._loaded
        return {
            "multiplier": self._multiplier.state_dict(),
            "journal": self._journal.state_dict(),
            "references": self._sensor.references,
            "steps": self._sensor.steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state for the start of training, when the optimizer is known."""
        self._loaded = state_dict


def _noise_scale(readings: Mapping[str, float]) -> float | None:
    """Returns the noise scale in samples that a decision was made by; None where it was not by one."""
    if "noise_trace" not in readings:
        return None
    noise, signal = readings["noise_trace"], readings["squared_gradient"]
    return 0.0 if noise <= 0 else noise / signal if signal > 0 else math.inf


def _base_rate(groups: Iterable[Mapping[str, Any]]) -> float | None:
    """Returns the highest rate that schedulers warm up to: `OneCycleLR` calls it `max_lr`, others `initial_lr`."""
    named = [group.get("max_lr", group.get("initial_lr")) for group in groups]
    return max((float(rate) for rate in named if rate is not None), default=None)
