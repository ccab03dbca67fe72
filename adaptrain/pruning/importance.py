"""What each unit is worth: scores that compare across layers and kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import Match
from adaptrain.pruning.projections import Slice
from adaptrain.pruning.surgery import slices

Scores = list[dict[str, list[float]]]
"""For each layer the score of every unit of the dense model by kind; 0 for units that are gone."""


class Scorer:
    """Scores the units of one model. What a method has to watch in training it overrides; all else does nothing.

    Args:
        match: The model.
        kinds: The kinds of units to score.
    """

    def __init__(self, match: Match, kinds: tuple[str, ...]) -> None:
        self.match = match
        self.kinds = kinds

    @property
    def ready(self) -> bool:
        """Whether there is something to score by."""
        return True

    def check(self) -> None:
        """Raises `ConfigurationError` for a model that cannot be scored."""

    def start(self) -> Callable[[], None]:
        """Begins to watch training; returns what ends it."""
        return lambda: None

    def update(self) -> None:
        """Takes in an optimizer step, before it is taken."""

    def scores(self) -> Scores:
        """Returns the scores, 0 or above, so that layers and kinds compare."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain Python."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the state of a run that is resumed."""


class RunningScores(Scorer):
    """Scores by a value of each unit that is seen at every step, averaged exponentially and debiased.

    Compared as they are, such values let whole layers lose all their heads: a value of one unit says nothing of what
    taking many out of one layer does, and layers differ in scale. So the scores of each layer and kind are scaled to
    a root mean square of the parameters of one unit.

    Args:
        match: The model.
        kinds: The kinds of units to score.
        decay: Weight of the past in the average; 0.95 remembers about 20 optimizer steps.
    """

    def __init__(self, match: Match, kinds: tuple[str, ...], *, decay: float = 0.95) -> None:
        super().__init__(match, kinds)
        self.decay = decay
        self._averages: dict[tuple[int, str], Tensor] = {}
        self._steps = 0

    @property
    def ready(self) -> bool:
        """Whether any step has been seen."""
        return self._steps > 0

    @torch.no_grad()
    def observe(self, values: Mapping[tuple[int, str], Tensor]) -> None:
        """Takes in one step: a value of every unit that is left, by layer and kind. A step not finite is left out."""
        if not values:
            return
        structure, sizes = structures.current(self.match), structures.dimensions(self.match)
        usable = torch.stack([value.sum().isfinite() for value in values.values()]).all()
        for (layer, kind), value in values.items():
            average = self._averages.get((layer, kind))
            if average is None:
                average = self._averages[layer, kind] = value.new_zeros(sizes[layer][kind])
            kept = structure[layer][kind]
            if len(kept) == len(average):
                average.copy_(self._merge(average, torch.where(usable, value, self._nothing(average))))
            else:
                index = torch.tensor(kept, device=value.device)
                past = average[index]
                average[index] = self._merge(past, torch.where(usable, value, self._nothing(past)))
        self._steps += 1

    def _merge(self, past: Tensor, value: Tensor) -> Tensor:
        return past.lerp(value, 1 - self.decay)

    def _nothing(self, past: Tensor) -> Tensor:
        """What to merge for a step that is left out."""
        return past

    def _correction(self) -> float:
        return 1 - self.decay**self._steps

    def changes(self) -> Scores:
        """Returns the average of each unit, as it was seen."""
        correction = self._correction()
        found: Scores = []
        sizes = structures.dimensions(self.match)
        for layer, kept in enumerate(structures.current(self.match)):
            found.append({kind: [0.0] * sizes[layer][kind] for kind in self.kinds})
            for kind in self.kinds:
                if (layer, kind) in self._averages:
                    averages = self._averages[layer, kind].tolist()
                    for unit in kept[kind]:
                        found[layer][kind][unit] = averages[unit] / correction
        return found

    def scores(self) -> Scores:
        """Returns the averages, scaled so that layers and kinds compare."""
        changes = self.changes()
        for layer, kept in enumerate(structures.current(self.match)):
            for kind in self.kinds:
                values = changes[layer][kind]
                square = sum(values[unit] ** 2 for unit in kept[kind])
                if square > 0:
                    scale = unit_params(self.match, layer, kind) * math.sqrt(len(kept[kind]) / square)
                    changes[layer][kind] = [value * scale for value in values]
        return changes

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages as plain Python."""
        return {"steps": self._steps, "averages": [[*key, value.tolist()] for key, value in self._averages.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the averages of a run that is resumed."""
        parameter = next(self.match.model.parameters())
        self._steps = state["steps"]
        self._averages = {
            (layer, kind): torch.tensor(values, dtype=parameter.dtype, device=parameter.device)
            for layer, kind, values in state["averages"]
        }


class TaylorScores(RunningScores):
    """First-order Taylor importance: how much the loss would change, to first order, without the unit.

    A gate ξ = 1 on a unit's output has the gradient ∂L/∂ξ = Σ g·w over the unit's columns of the output projection,
    so |Σ g·w| there estimates |L(ξ=1) − L(ξ=0)| from gradients that training computes anyway. Padding has no gradient
    and counts for nothing.

    Sources: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference"; Michel
    et al. 2019, "Are Sixteen Heads Really Better than One?".
    """

    def check(self) -> None:
        """Refuses a model whose gradients will not be there.

        Raises:
            ConfigurationError: An output projection is frozen.
        """
        check_trained(self.match, self.kinds, "taylor", lambda parts: parts[-1:])

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the gradients of an optimizer step; a step whose gradients are missing or not finite is left out."""
        gates: dict[tuple[int, str], Tensor] = {}
        for layer, kept in enumerate(structures.current(self.match)):
            for kind in self.kinds:
                if kept[kind]:
                    output = slices(self.match, layer, kind)[-1]
                    weight = output.weight
                    if weight.grad is None:
                        return
                    gates[layer, kind] = output.per_unit(weight.grad * weight).abs()
        self.observe(gates)


class MagnitudeScores(Scorer):
    """See `magnitude_scores`."""

    def scores(self) -> Scores:
        """Returns the scores of the weights as they are now."""
        return magnitude_scores(self.match, self.kinds)


def check_trained(
    match: Match, kinds: tuple[str, ...], method: str, used: Callable[[list[Slice]], list[Slice]]
) -> None:
    """Refuses a model whose gradients will not be there.

    Args:
        match: The model.
        kinds: The kinds of units that are scored.
        method: The name of the method, for the message.
        used: Which of a unit's projections it needs the gradient of.

    Raises:
        ConfigurationError: One of them is frozen.
    """
    for layer in range(len(match.layers)):
        for kind in kinds:
            if any(not part.weight.requires_grad for part in used(slices(match, layer, kind))):
                raise ConfigurationError(
                    f"importance='{method}' scores by gradients, but the {kind} of layer {layer} are frozen"
                    " (requires_grad=False). Use importance='magnitude', or train them."
                )


@torch.no_grad()
def magnitude_scores(match: Match, kinds: tuple[str, ...]) -> Scores:
    """Scores units by the size of their weights: the L2 norm over all parameters of the unit.

    The scores of each layer and kind are scaled so that their mean is the parameters of one unit: layers of another
    scale compare, and a head counts for as many neurons as it has parameters for.

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", by group.

    Args:
        match: The model.
        kinds: The kinds of units to score.

    Returns:
        The scores.
    """
    structure, sizes = structures.current(match), structures.dimensions(match)
    scores: Scores = []
    for layer, kept in enumerate(structure):
        scores.append({})
        for kind in kinds:
            values = [0.0] * sizes[layer][kind]
            if kept[kind]:
                for unit, score in zip(kept[kind], _relative_size(match, layer, kind), strict=True):
                    values[unit] = score
            scores[layer][kind] = values
    return scores


def _relative_size(match: Match, layer: int, kind: str) -> list[float]:
    squares: Tensor | None = None
    for part in slices(match, layer, kind):
        for parameter in part.parameters():
            units = part.per_unit(parameter.double().pow(2))
            squares = units if squares is None else squares + units
    assert squares is not None
    size = squares.sqrt()
    return (size / size.mean().clamp_min(1e-30) * unit_params(match, layer, kind)).tolist()


def unit_params(match: Match, layer: int, kind: str) -> float:
    """Returns the parameters of one unit."""
    parts = slices(match, layer, kind)
    return sum(parameter.numel() for part in parts for parameter in part.parameters()) / parts[-1].units
