"""Lets the dense model teach the one that is pruned."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from adaptrain import _lightning
from adaptrain._lightning.training_step import wrap_training_step
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.errors import ConfigurationError
from adaptrain.execution.distillation import DistillationLoss
from adaptrain.execution.logit_cache import LogitCache
from adaptrain.execution.oom import attempt, release_memory, weights_on_host
from adaptrain.pruning.cost import count_params
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import Match
from adaptrain.pruning.teacher import (
    check_teacher,
    copy_teacher,
    frozen,
    load_teacher,
    restore_teacher,
    teacher_state,
)

CHECKPOINT_KEY = "adaptrain_teacher"
CACHE_KEY = "adaptrain_teacher_logits"

_log = logging.getLogger(__name__)


class Distillation(AdaptiveCallback):
    """Trains the model on what a frozen teacher says as well: knowledge distillation.

    By default the teacher is the model itself as it was right before its structure first changed, the last and best
    dense weights. Until then nothing happens and nothing is paid. From then on every `training_step` returns

        (1 − weight) · task loss + weight · temperature² · KL(teacher ‖ student)

    (Hinton et al. 2015), where logits count as the task's loss counts them: for a causal language model only where a
    label does. The student's logits are those that `training_step` computes anyway; the teacher costs a forward pass,
    measured at 0.3 of a dense step (MiniLM on a CPU), so that a step of a model pruned to half takes 1.5 times as
    long. What the module logs itself stays the task's loss; `outputs["loss"]` is the sum, and
    `adaptrain/distillation_loss` the teacher's part. Micro-batches of `BatchSizeController` are taught one by one,
    which gives the same gradient.

    Where there is no memory for a copy of the dense model, training goes on without a teacher, with a warning.

    A dense teacher is in every checkpoint that can be resumed, which grows by the model's size; a checkpoint of
    weights alone has none. The teacher's logits of a sample are kept and not computed again when the sample comes back
    in a later epoch: for classifiers, in host memory, as far as `cache_mib` allows. They are in the checkpoint too, so
    that a resumed run is taught the same.

    Within a wall-clock budget the teacher's passes are paid with steps: schedules go by progress, so training still
    ends annealed and in time, after fewer of them. `every` sets the price.

    Args:
        teacher: `"dense"`; or a Hugging Face folder or hub name, or a module, that teaches from the start.
        temperature: Of both softmaxes, above 0.
        weight: Of the teacher in the loss, in (0, 1].
        hidden: Also add the mean squared error between the last hidden states of both to the teacher's part, without
            padding.
        every: The teacher is asked on every so many optimizer steps, at least 1; on the others the loss is the task's.
        cache_mib: Host memory, in MiB, for the teacher's logits of samples that come again; 0: they are computed each
            time. A sample of two classes takes about 0.2 KiB. Not used with `hidden`, nor for language models.
        dry_run: Record when the teacher would begin, and teach nothing.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range; or, before training, the trainer, the model or the teacher
            cannot be served, or its logits are not the student's.
    """

    def __init__(
        self,
        *,
        teacher: str | nn.Module = "dense",
        temperature: float = 2.0,
        weight: float = 0.5,
        hidden: bool = False,
        every: int = 1,
        cache_mib: float = 64.0,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        if not isinstance(teacher, nn.Module) and not (isinstance(teacher, str) and teacher):
            raise ConfigurationError(
                f"teacher must be 'dense', a Hugging Face folder or name, or a module, got {teacher!r}."
            )
        if not (_is_number(temperature) and temperature > 0):
            raise ConfigurationError(f"temperature must be a number greater than 0, got {temperature!r}.")
        if not (_is_number(weight) and 0 < weight <= 1):
            raise ConfigurationError(f"weight is the teacher's share of the loss, in (0, 1], got {weight!r}.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigurationError(f"every must be a whole number of optimizer steps of at least 1, got {every!r}.")
        if not (_is_number(cache_mib) and cache_mib >= 0):
            raise ConfigurationError(f"cache_mib must be a number of MiB of at least 0, got {cache_mib!r}.")
        self.teacher = teacher
        self.temperature = temperature
        self.weight = weight
        self.hidden = hidden
        self.every = every
        self.cache_mib = cache_mib
        self._cache = LogitCache(cache_mib * 2**20)
        self._match: Match | None = None
        self._began = False  # in a dry run: would have
        self._gave_up = False  # no memory for the teacher
        self._model: nn.Module | None = None
        self._loss: DistillationLoss | None = None

    @property
    def _is_dense(self) -> bool:
        return isinstance(self.teacher, str) and self.teacher == "dense"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets the teacher of an earlier fit."""
        if stage == "fit":
            self._began, self._gave_up, self._model, self._loss = False, False, None, None
            self._cache = LogitCache(self.cache_mib * 2**20)
        super().setup(trainer, pl_module, stage)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses, before training, what cannot be taught, and a teacher that does not fit."""
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)
        match = self._match = find_family(pl_module)
        config = getattr(match.model, "config", None)
        problem = getattr(config, "problem_type", None)
        if problem in ("regression", "multi_label_classification") or getattr(config, "num_labels", 2) == 1:
            raise ConfigurationError(
                f"Distillation compares the probabilities of classes, but {type(match.model).__name__} is trained for"
                f" {problem or 'regression'}. Leave it out."
            )
        if self._is_dense:
            check_teacher(match.model, match, hidden=False)  # the student's own logits
        else:
            model = frozen(self.teacher) if isinstance(self.teacher, nn.Module) else load_teacher(self.teacher)
            check_teacher(model, match, hidden=self.hidden)
            self._model = model

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens every `training_step` to the teacher."""
        super().on_fit_start(trainer, pl_module)
        if self.dry_run:
            return
        if self._model is not None:
            self._begin(pl_module)
        self.on_exit(self._rest)
        self.on_exit(wrap_training_step(pl_module, lambda step: self._step(trainer, pl_module, step)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Records a teacher that teaches from the start."""
        if self._began and self._loss is None and not self.dry_run:
            raise ConfigurationError(
                "The checkpoint does not hold the teacher that its run had. Resume one that training has written, or"
                " give the teacher as a folder."
            )
        if not self._is_dense and not self._began:
            kind = f"{type(self._model).__name__} given" if isinstance(self.teacher, nn.Module) else repr(self.teacher)
            self._record(trainer, f"The {kind} as teacher teaches from the start")

    def on_before_change(self, trainer: Any, pl_module: Any, knob: str, *, at_end: bool = False) -> None:
        """Takes the dense model as the teacher, before its structure changes for the first time."""
        if knob != "structure" or at_end or not self._is_dense or self._began or self._gave_up or self._match is None:
            return
        if not self.dry_run:
            if not self._take_copy(trainer, pl_module, self._match):
                return
            self._begin(pl_module)
        self._record(trainer, f"The dense model of step {trainer.global_step} teaches from here on")

    def _take_copy(self, trainer: Any, pl_module: Any, match: Match) -> bool:
        """Copies the model as the teacher; on every rank, or on none where one has no memory for it."""
        self._model, lack = attempt(lambda: copy_teacher(match), host_bytes=weights_on_host(match.model))
        (lacking,) = _lightning.all_reduce([float(self._model is None)], op="max", device=pl_module.device)
        if lacking:
            self._gave_up, self._model = True, None
            release_memory()
            why = f"No memory for a copy of the dense model ({lack or 'on another rank'}): nothing teaches"
            _log.warning("%s, and training goes on without.", why)
            self.record(trainer, "distillation", old=0.0, new=0.0, reason=why, readings={})
        return not lacking

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Says where there was nothing to teach."""
        if not self._began and not self._gave_up:
            _log.warning(
                "Distillation did nothing: it waits for the model's structure to change, to take the dense model as its"
                " teacher, and it never changed. Add ProgressivePruning, or give a teacher."
            )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps a dense teacher's weights, and what it has said."""
        if self._is_dense and self._model is not None and self._match is not None:
            checkpoint.setdefault(CHECKPOINT_KEY, {})[self.state_key] = teacher_state(self._match, self._model)
        if self._began and len(self._cache):
            checkpoint.setdefault(CACHE_KEY, {})[self.state_key] = self._cache.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Takes a dense teacher back."""
        saved = checkpoint.get(CHECKPOINT_KEY, {}).get(self.state_key)
        if saved is not None and self._is_dense and self._match is not None:
            self._model = restore_teacher(self._match, saved)
        said = checkpoint.get(CACHE_KEY, {}).get(self.state_key)
        if said is not None:
            self._cache.load_state_dict(said)

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the teacher has begun, or found no memory."""
        return {"began": self._began, "gave_up": self._gave_up}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with it."""
        self._began = state_dict["began"]
        self._gave_up = state_dict.get("gave_up", False)

    def _record(self, trainer: Any, what: str) -> None:
        self._began = True
        often = "" if self.every == 1 else f", on every {self.every}th step"
        readings = {"temperature": self.temperature, "every": self.every, "hidden": self.hidden}
        if self._model is not None:
            readings["teacher_params"] = count_params(self._model)
        self.record(
            trainer,
            "distillation",
            old=0.0,
            new=self.weight,
            reason=f"{what}, with {self.weight:.0%} of the loss at temperature {self.temperature:g}{often}",
            readings=readings,
        )

    def _begin(self, pl_module: Any) -> None:
        assert self._match is not None
        assert self._model is not None
        self._loss = DistillationLoss(
            self._match.model,
            self._model.to(pl_module.device),
            temperature=self.temperature,
            weight=self.weight,
            backbone=self._match.family.backbone if self.hidden else None,
            cache=self._cache if self.cache_mib else None,
        )

    def _step(self, trainer: Any, pl_module: Any, step: Callable[[], Any]) -> Any:
        if self._loss is None or trainer.global_step % self.every:
            return step()
        result, taught = self._loss(step)
        if taught is not None and trainer.loggers:
            pl_module.log("adaptrain/distillation_loss", taught, batch_size=self._loss.samples)
        return result

    def _rest(self) -> None:
        """Frees the device; the teacher stays for checkpoints that are written after fit."""
        self._loss = None
        if self._model is not None:
            self._model.cpu()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
