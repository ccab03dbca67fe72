"""Stops training the first layers once they hardly change, which saves their backward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from adaptrain import _lightning
from adaptrain._lightning.structure import forget_compiled, unwrapped
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.errors import ConfigurationError
from adaptrain.execution.update_probe import total_norm, were_trained
from adaptrain.policies.freezing import By, Freezing
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import Match

_log = logging.getLogger(__name__)


class LayerFreezing(AdaptiveCallback):
    """Freezes layers from the first one up, and thaws them where the loss rises or the structure changes.

    A frozen layer still runs forward, in evaluation mode: without dropout, and its norms keep their statistics. Its
    backward pass, its gradients and its step in the optimizer fall away, and so do those of the embeddings below it and
    the activations kept for them; of a layer that costs a third of a step forward and two thirds backward, more than
    two thirds are saved. Embeddings tied to the output go on learning from there. The optimizer keeps its state for
    layers that thaw. Frozen weights take no weight decay.

    Nothing is frozen while `ProgressivePruning` has events to come, since it reads the gradients of all layers: beside
    it `"unfreezing"` freezes nothing at all, and says so. A change of structure thaws what is frozen. In
    `DistributedDataParallel` the wrapper is built anew at each change, on all ranks alike.

    Args:
        by: `"signal"`: layers whose gradients change least (AutoFreeze); `"schedule"`: evenly from `begin` to `end`
            (FreezeOut); `"turns"`: `most` of them at once, which train in one window of every `every`;
            `"unfreezing"`: `most` of them from the first step on, which train evenly from `begin` to `end`, the last
            ones first (gradual unfreezing, for a model that was trained before; measured with `most=0.67, begin=0.4,
            end=0.5`); see `adaptrain.policies.freezing`.
        most: The largest share of the layers to freeze, in (0, 1); at least one layer trains.
        begin: The share of training, in [0, 1), before which nothing is frozen, or before which `"unfreezing"` thaws
            nothing.
        end: The share, above `begin`, at which `"schedule"` has frozen the last layer, and `"unfreezing"` thawed it.
        every: In one window of how many `"turns"` trains all layers, at least 2.
        window: Optimizer steps between two decisions; None: a fiftieth of the run, at least 10.
        dry_run: Decide and record, freeze nothing.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range; or, before training, the model is of no known family, or
            has an encoder and a decoder.
    """

    def __init__(
        self,
        *,
        by: By = "signal",
        most: float = 0.5,
        begin: float = 0.3,
        end: float = 0.7,
        every: int = 2,
        window: int | None = None,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        if by not in get_args(By):
            raise ConfigurationError(f"by must be one of {', '.join(get_args(By))}, got {by!r}.")
        for argument, value in (("most", most), ("begin", begin), ("end", end)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigurationError(f"{argument} must be a share in [0, 1], got {value!r}.")
        if not 0 < most < 1:
            raise ConfigurationError(f"most must be a share of the layers in (0, 1), got {most!r}.")
        if end <= begin:
            raise ConfigurationError(f"end must be above begin, got begin={begin} and end={end}.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 2:
            raise ConfigurationError(f"every must be a whole number of windows of at least 2, got {every!r}.")
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 2):
            raise ConfigurationError(f"window must be a whole number of steps of at least 2, got {window!r}.")
        self.by: By = by
        self.most = most
        self.begin = begin
        self.end = end
        self.every = every
        self.window = window
        self._loaded: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._match: Match | None = None
        self._policy: Freezing | None = None
        self._below: list[nn.Parameter] = []  # what comes before the first layer, and nowhere else
        self._asleep: list[nn.Parameter] = []  # what this callback has frozen
        self._resting: list[nn.Module] = []  # what it has set to evaluation
        self._hook: Callable[[], object] | None = None
        self._norms: list[Tensor] = []  # sums over the window, of the layers that train
        self._losses: list[Tensor] = []
        self._steps = 10

    @property
    def frozen(self) -> int:
        """How many layers are frozen, from the first one up."""
        return 0 if self._policy is None else self._policy.frozen

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begins anew with a fit."""
        if stage == "fit":
            self._reset()
        super().setup(trainer, pl_module, stage)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses models whose layers are no chain."""
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)
        self._match = find_family(pl_module)
        model = self._match.model
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ConfigurationError(
                f"LayerFreezing does not serve {type(model).__name__}: its decoder's layers read the encoder's output,"
                " so that they are no chain that could be frozen from one end."
            )
        self._below = _parameters_below(model, self._match.layers)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Builds the policy, and freezes again what a resumed run had frozen."""
        if self.begin > 0 or self.by in ("schedule", "unfreezing"):
            _lightning.refuse_endless(trainer, user=type(self).__name__)
        assert self._match is not None
        count = len(self._match.layers)
        most = max(1, min(count - 1, round(self.most * count)))
        if count < 2:
            raise ConfigurationError("LayerFreezing needs a model of at least two layers: one has to train.")
        self._policy = Freezing(count, by=self.by, most=most, begin=self.begin, end=self.end, every=self.every)
        total = _lightning.total_steps(trainer)
        self._steps = self.window or max(10, (total or 0) // 50)
        if loaded := self._loaded:
            self._loaded = {}
            self._policy.load_state_dict(loaded["policy"])
            self._norms = [torch.tensor(value) for value in loaded["norms"]]
            self._losses = [torch.tensor(value) for value in loaded["losses"]]
            self._apply(trainer, pl_module)
        elif self.by == "unfreezing":
            self._begin_frozen(trainer, pl_module, self._match)
        self.on_exit(self._wake)

    def _begin_frozen(self, trainer: Any, pl_module: Any, match: Match) -> None:
        assert self._policy is not None
        hold = _is_read(trainer)
        reason = self._policy.start(progress=_lightning.progress(trainer), hold=hold)
        if reason:
            self._change(trainer, pl_module, 0, reason, {})
        frozen = [p for layer in match.layers[: self.frozen] for p in layer.parameters()]
        if hold:
            _log.warning("LayerFreezing freezes nothing: another callback reads the gradients of all layers at first.")
        elif frozen and not were_trained(frozen):
            _log.warning(
                "LayerFreezing(by='unfreezing') freezes %d layers that seem never to have been trained: it is for a"
                " pretrained model.",
                self.frozen,
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Adds the gradient norms of the layers that train."""
        if self._match is None or self._policy is None:
            return
        norms = [_gradient_norm(layer) for layer in self._match.layers[self._policy.frozen :]]
        self._norms = [a + b for a, b in zip(self._norms, norms, strict=True)] if self._norms else norms

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Decides at the end of a window."""
        if self._policy is None or not _lightning.at_step_boundary(trainer):
            return
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            self._losses.append(outputs["loss"].detach().float())
        if len(self._losses) < self._steps or not self._norms:
            return
        count = len(self._losses)
        seen = [*(norm / count for norm in self._norms), *self._losses]
        numbers = torch.stack([value.to(pl_module.device).float() for value in seen]).tolist()
        numbers = _lightning.all_reduce(numbers, device=pl_module.device)  # so that all ranks decide alike
        norms, losses = numbers[: len(self._norms)], numbers[len(self._norms) :]
        self._norms, self._losses = [], []
        old = self._policy.frozen
        reason = self._policy.window(norms, losses, progress=_lightning.progress(trainer), hold=_is_read(trainer))
        if reason:
            self._change(trainer, pl_module, old, reason, {"loss": sum(losses) / len(losses)})

    def on_before_change(self, trainer: Any, pl_module: Any, knob: str, *, at_end: bool = False) -> None:
        """Thaws all layers before the structure changes: what is left of them has to settle."""
        if knob == "structure" and self._policy is not None and self._policy.frozen:
            old = self._policy.frozen
            self._policy.thaw()
            self._norms, self._losses = [], []
            self._change(trainer, pl_module, old, "the structure is about to change, so all layers train again", {})

    def _change(self, trainer: Any, pl_module: Any, old: int, reason: str, readings: dict[str, float]) -> None:
        assert self._policy is not None
        new = self._policy.frozen
        self._apply(trainer, pl_module)
        self.record(trainer, "frozen_layers", old=old, new=new, reason=reason, readings=readings)

    def _apply(self, trainer: Any, pl_module: Any) -> None:
        """Freezes as many layers as the policy says, and lets the others train."""
        assert self._match is not None
        assert self._policy is not None
        if self.dry_run:
            return
        count = self._policy.frozen
        with unwrapped(trainer):
            self._wake()
            if count:
                layers = self._match.layers
                chosen = [*self._below, *(p for layer in layers[:count] for p in layer.parameters())]
                self._asleep = [p for p in chosen if p.requires_grad]
                for parameter in self._asleep:
                    parameter.requires_grad_(False)
                    parameter.grad = None
                self._resting = _trained_only_by(chosen, self._match.model)
                for module in self._resting:
                    module.training = False
                # Tied embeddings still train, from the output: the input's gradient stops here.
                self._hook = layers[count].register_forward_pre_hook(_detach, with_kwargs=True).remove
        forget_compiled(pl_module)

    def _wake(self) -> None:
        for parameter in self._asleep:
            parameter.requires_grad_(True)
        for module in self._resting:
            module.training = True
        self._asleep, self._resting = [], []
        if self._hook is not None:
            self._hook()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the policy's state and the window so far, as plain Python."""
        if self._policy is None:
            return self._loaded
        return {
            "policy": self._policy.state_dict(),
            "norms": [float(norm) for norm in self._norms],
            "losses": [float(loss) for loss in self._losses],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state for the start of training."""
        self._loaded = state_dict


def _is_read(trainer: Any) -> bool:
    """Whether another callback reads the gradients of all layers."""
    return any(isinstance(other, AdaptiveCallback) and other.needs_gradients for other in trainer.callbacks)


def _parameters_below(model: Any, layers: Any) -> list[nn.Parameter]:
    """Returns the parameters of modules that were registered before the first layer, and of no other ones.

    A tied embedding is the output's as well, and so is not among them.
    """
    first = next(iter(layers[0].parameters()))
    names = list(model.named_parameters(remove_duplicate=False))
    place = next(i for i, (_, parameter) in enumerate(names) if parameter is first)
    later = {id(parameter) for _, parameter in names[place:]}
    return [parameter for _, parameter in names[:place] if id(parameter) not in later]


def _trained_only_by(parameters: Sequence[nn.Parameter], model: nn.Module) -> list[nn.Module]:
    """Returns the modules in training mode whose parameters are all among these, with all that is within them."""
    chosen = {id(parameter) for parameter in parameters}
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        owned = list(module.parameters())
        if owned and all(id(parameter) in chosen for parameter in owned):
            found.update(dict.fromkeys(within for within in module.modules() if within.training))
    return list(found)


def _gradient_norm(layer: nn.Module) -> Tensor:
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    return total_norm(gradients).to(next(layer.parameters()).device)


def _detach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and value.requires_grad else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
