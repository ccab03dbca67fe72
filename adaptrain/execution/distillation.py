"""The loss of a student that a frozen teacher helps to train (knowledge distillation)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptrain.errors import ConfigurationError
from adaptrain.execution.logit_cache import LogitCache
from adaptrain.execution.split import IGNORED


@dataclass
class Pass:
    """One forward pass of the student: what it was given, and what came out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: Tensor
    given: dict[str, Any] = field(default_factory=dict)  # the arguments by name
    hidden: Tensor | None = None


class DistillationLoss:
    """Adds to a training step's loss what a teacher says of the same inputs.

        loss = (1 − weight) · task + weight · (temperature² · KL(teacher ‖ student) + hidden-state MSE)

    with both softmaxes at the temperature, and the square so that gradients keep their size. Logits count where the
    task's loss counts them: every sample of a classifier, tokens whose label is not -100, for a causal language model
    those that predict such a token. Where the model is not given labels, tokens that are not padding. Hidden states
    count at the same tokens; for a classifier, by sample, at those that are not padding.

    The student's outputs are taken from the forward pass that the step makes anyway; the teacher runs once more on
    the same inputs, without gradients and without dropout.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; hidden states: Jiao et al. 2020,
    "TinyBERT", of the last layer alone.

    Args:
        student: The model that is trained; its output has `logits`.
        teacher: A frozen model with logits of the same shape.
        temperature: Of both softmaxes, above 0.
        weight: Of the teacher, in (0, 1].
        backbone: Returns the module of a model whose first output is the last hidden state, for the MSE between the
            two; None: only logits.
        cache: Where the teacher's logits are kept for samples that come again; None: nowhere. Hidden states are not.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float,
        weight: float,
        backbone: Callable[[Any], nn.Module] | None = None,
        cache: LogitCache | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.temperature = temperature
        self.weight = weight
        self.samples = 0  # of the step just run
        self._backbone = backbone
        self._cache = cache if backbone is None else None

    def __call__(self, step: Callable[[], Any]) -> tuple[Any, Tensor | None]:
        """Runs a training step.

        Args:
            step: Returns a loss, a mapping with a `loss`, or None.

        Returns:
            The same with the teacher's part in the loss; and the teacher's part alone, detached, None where the step
            returned None.

        Raises:
            ConfigurationError: The step did not run the student, or its output has no logits.
        """
        passes: list[Pass] = []
        with watch(self.student, passes, self._backbone):
            result = step()
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if loss is None:
            return result, None
        if not passes:
            raise ConfigurationError(
                f"Distillation needs the logits of {type(self.student).__name__}, but training_step did not call it"
                " with gradients. Call the model itself there (self.model(**batch)), or leave Distillation out."
            )
        self.samples = len(passes[0].logits)
        taught = torch.stack([self._teach(each) for each in passes]).mean()
        total = (1 - self.weight) * loss + self.weight * taught
        return ({**result, "loss": total} if isinstance(result, Mapping) else total), taught.detach()

    def _teach(self, each: Pass) -> Tensor:
        theirs, their_hidden = self._ask(each)
        ours = each.logits
        if theirs.shape != ours.shape:
            raise ConfigurationError(
                f"The teacher's logits are of shape {tuple(theirs.shape)}, the student's {tuple(ours.shape)}. They must"
                " have the same classes, or the same vocabulary."
            )
        counted = counted_logits(self.student, each)
        exact = torch.promote_types(ours.dtype, torch.float32)
        taught = self.temperature**2 * divergence(ours, theirs, counted, self.temperature)
        if each.hidden is not None and their_hidden is not None:
            by_token = (each.hidden.to(exact) - their_hidden.to(exact)).square().mean(-1)
            taught = taught + _mean_error(by_token, counted, each)
        return taught

    @torch.no_grad()
    def _ask(self, each: Pass) -> tuple[Tensor, Tensor | None]:
        hidden: list[Tensor] = []
        handle = None
        if self._backbone is not None:
            handle = self._backbone(self.teacher).register_forward_hook(
                lambda module, inputs, output: hidden.append(output[0])
            )
        kwargs = {name: value for name, value in each.kwargs.items() if name != "labels"}
        try:
            if self._cache is None:
                logits = self._logits_of_teacher(*each.args, **kwargs)
            else:
                mask = each.given.get("attention_mask")
                padded = isinstance(mask, Tensor) and mask.ndim == 2
                logits = self._cache.ask(self._logits_of_teacher, each.args, kwargs, mask if padded else None)
        finally:
            if handle is not None:
                handle.remove()
        return logits, hidden[-1] if hidden else None

    def _logits_of_teacher(self, *args: Any, **kwargs: Any) -> Tensor:
        return _logits(self.teacher(*args, **kwargs), self.teacher, "The teacher ")


@contextmanager
def watch(student: nn.Module, passes: list[Pass], backbone: Callable[[Any], nn.Module] | None = None) -> Iterator[None]:
    """Notes the forward passes of a model that are made with gradients.

    Args:
        student: The model; its outputs have logits.
        passes: Where they are noted.
        backbone: Returns the module whose first output is the last hidden state, to be noted as well; None: it is not.
    """
    hidden: list[Tensor] = []

    def keep_hidden(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden[:] = [output[0]]

    def keep(model: Any, args: Any, kwargs: Any, output: Any) -> None:
        logits = _logits(output, model, "")
        if logits.requires_grad:
            given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
            passes.append(Pass(args, kwargs, logits, {**given, **kwargs}, hidden[0] if hidden else None))

    handles = [student.register_forward_hook(keep, with_kwargs=True)]
    if backbone is not None:
        handles.append(backbone(student).register_forward_hook(keep_hidden))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def divergence(ours: Tensor, theirs: Tensor, counted: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Returns KL(theirs ‖ ours) of the logits that count, the mean over them.

    Args:
        ours: The student's logits.
        theirs: The teacher's, of the same shape.
        counted: Which of them count, as `counted_logits` says.
        temperature: Of both softmaxes.
    """
    exact = torch.promote_types(ours.dtype, torch.float32)
    ours, theirs = (F.log_softmax(pick(logits, counted).to(exact) / temperature, -1) for logits in (ours, theirs))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) / max(1, len(ours))


def _logits(output: Any, model: nn.Module, who: str) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigurationError(
            f"{who}{type(model).__name__} returns a {type(output).__name__} without logits, which Distillation needs."
        )
    return logits


def is_causal(model: Any) -> bool:
    """Whether a Hugging Face model's logits at a token predict the next one."""
    able = getattr(model, "can_generate", None)
    return bool(callable(able) and able()) and not getattr(model.config, "is_encoder_decoder", False)


def counted_logits(student: nn.Module, each: Pass) -> Tensor | None:
    """Returns which logits the task's loss counts, the last token left out for a causal model; None: all."""
    labels, mask = each.given.get("labels"), each.given.get("attention_mask")
    positions = each.logits.shape[:-1]
    if isinstance(labels, Tensor) and labels.shape == positions and not labels.is_floating_point():
        counted = labels != IGNORED
    elif len(positions) == 2 and isinstance(mask, Tensor) and mask.shape == positions:
        counted = mask != 0
    else:
        return None
    return counted[:, 1:] if len(positions) == 2 and is_causal(student) else counted


def pick(values: Tensor, counted: Tensor | None) -> Tensor:
    """Returns the rows that count, shape (rows, ...)."""
    if counted is None:
        return values.flatten(0, -2)
    return values[:, : counted.shape[1]][counted] if counted.ndim == 2 else values[counted]


def _mean_error(by_token: Tensor, counted: Tensor | None, each: Pass) -> Tensor:
    """Returns the mean as the task's loss forms it: over tokens that count, or over samples, each a mean."""
    if counted is not None and counted.ndim == 2:
        return pick(by_token, counted).sum() / counted.sum().clamp_min(1)
    mask = each.given.get("attention_mask")
    real = mask != 0 if isinstance(mask, Tensor) and mask.shape == by_token.shape else torch.ones_like(by_token)
    by_sample = (by_token * real).sum(1) / real.sum(1).clamp_min(1)
    return by_sample.mean() if counted is None else by_sample[counted].sum() / counted.sum().clamp_min(1)
