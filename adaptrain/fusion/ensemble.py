"""Several models that answer together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from adaptrain.errors import ConfigurationError


@dataclass(frozen=True)
class EnsembleOutput:
    """What an ensemble answers.

    Args:
        logits: Of shape (..., classes). Where probabilities are combined, their logarithm.
        probabilities: Of the same shape, summing to 1 over the classes.
    """

    logits: Tensor
    probabilities: Tensor


class Ensemble(nn.Module):
    """Averages what models say of the same input. They may differ in architecture, but not in their classes.

    It costs the time and memory of all of its members; `adaptrain.fusion.merge` costs that of one.

    Source: Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles"
    (mean of probabilities).

    Args:
        models: The models, each returning logits of shape (..., classes) or something that has them as `logits`.
        weights: A weight for each model, at least 0; they are scaled to sum to 1. None: all alike.
        combine: What is averaged: `"probabilities"` or `"logits"`.
        vectorize: Run the models as one batched computation (`torch.func.vmap`); they must be of one class and shape.
            It holds a copy of their weights, does not follow later changes of them, and pays where one model leaves
            a GPU idle. On the CPU torch has no batched attention (it warns); one after another is faster there.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        weights: Sequence[float] | None = None,
        combine: Literal["probabilities", "logits"] = "probabilities",
        vectorize: bool = False,
    ) -> None:
        super().__init__()
        if not models or not all(isinstance(model, nn.Module) for model in models):
            raise ConfigurationError(f"models must be at least one nn.Module, got {models!r}.")
        if combine not in ("probabilities", "logits"):
            raise ConfigurationError(f"combine must be 'probabilities' or 'logits', got {combine!r}.")
        given = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(models) or min(given) < 0 or sum(given) <= 0:
            raise ConfigurationError(
                f"weights must be one number of at least 0 for each of the {len(models)} models, not all 0;"
                f" got {weights!r}."
            )
        self.models = nn.ModuleList(models)
        self.combine = combine
        self.vectorize = vectorize
        self.register_buffer("weights", torch.tensor(given) / sum(given))
        if vectorize:
            _check_alike(models)
        self._stacked: tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> EnsembleOutput:
        """Asks all models the same.

        Args:
            *args: The models' positional inputs.
            **kwargs: The models' named inputs.

        Raises:
            ConfigurationError: They answer in different shapes.
        """
        if self.vectorize:
            base, parameters, buffers = self._stack()

            def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
                return _logits(functional_call(base, (parameters, buffers), args, kwargs))

            logits = torch.func.vmap(one, randomness="different")(parameters, buffers)
        else:
            said = [_logits(model(*args, **kwargs)) for model in self.models]
            if len({tuple(each.shape) for each in said}) > 1:
                shapes = ", ".join(str(tuple(each.shape)) for each in said)
                raise ConfigurationError(f"The models of an ensemble must answer in one shape, got {shapes}.")
            logits = torch.stack(said)
        values = logits.softmax(-1) if self.combine == "probabilities" else logits
        weights: Any = self.weights
        mean = torch.einsum("m,m...->...", weights.to(values), values)
        if self.combine == "probabilities":
            return EnsembleOutput(logits=mean.log(), probabilities=mean)
        return EnsembleOutput(logits=mean, probabilities=mean.softmax(-1))

    def _stack(self) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
        """Returns a model without weights, and the weights of all; stacked anew where the models have moved."""
        device = next(self.parameters()).device
        if self._stacked is None or next(iter(self._stacked[1].values())).device != device:
            parameters, buffers = stack_module_state(list(self.models))
            self._stacked = copy.deepcopy(self.models[0]).to("meta"), parameters, buffers
        return self._stacked


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _check_alike(models: Sequence[nn.Module]) -> None:
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models]
    if len({type(model) for model in models}) > 1 or any(shape != shapes[0] for shape in shapes):
        raise ConfigurationError(
            "vectorize=True needs models of one class whose weights have the same shapes. Leave it out: they then run"
            " one after another."
        )
