"""What each unit is worth: scores that compare across layers and kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import Match
from adaptrain.pruning.surgery import slices

METHODS = ("taylor", "magnitude")

Scores = list[dict[str, list[float]]]
"""For each layer the score of every unit of the dense model by kind; 0 for units that are gone."""


class TaylorScores:
    """First-order Taylor importance: how much the loss would change, to first order, without the unit.

    A gate ξ = 1 on a unit's output has the gradient ∂L/∂ξ = Σ g·w over the unit's columns of the output projection,
    so |Σ g·w| there estimates |L(ξ=1) − L(ξ=0)| from gradients that training computes anyway. Padding has no gradient
    and counts for nothing. The estimate is averaged over steps (exponentially, debiased).

    First order underrates taking many units out of one layer: compared as they are, whole layers lose all their heads.
    So the scores of each layer and kind are scaled to a root mean square of the parameters of one unit.

    Sources: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference"; Michel
    et al. 2019, "Are Sixteen Heads Really Better than One?".

    Args:
        match: The model.
        kinds: The kinds of units to score.
        decay: Weight of the past in the average; 0.95 remembers about 20 optimizer steps.
    """

    def __init__(self, match: Match, kinds: tuple[str, ...], *, decay: float = 0.95) -> None:
        self.match = match
        self.kinds = kinds
        self.decay = decay
        self._averages: dict[tuple[int, str], Tensor] = {}
        self._steps = 0

    @property
    def ready(self) -> bool:
        """Whether any gradient has been seen."""
        return self._steps > 0

    def check(self) -> None:
        """Refuses a model whose gradients will not be there.

        Raises:
            ConfigurationError: An output projection is frozen.
        """
        for layer in range(len(self.match.layers)):
            for kind in self.kinds:
                parts = slices(self.match, layer, kind)
                if parts and not parts[-1].weight.requires_grad:
                    raise ConfigurationError(
                        f"importance='taylor' scores by gradients, but the {kind} of layer {layer} are frozen"
                        " (requires_grad=False). Use importance='magnitude', or train them."
                    )

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the gradients of an optimizer step; a step whose gradients are missing or not finite is left out."""
        structure = structures.current(self.match)
        sizes = structures.dimensions(self.match)
        gates: dict[tuple[int, str], Tensor] = {}
        for layer, kept in enumerate(structure):
            for kind in self.kinds:
                if kept[kind]:
                    output = slices(self.match, layer, kind)[-1]
                    weight = output.weight
                    if weight.grad is None:
                        return
                    gates[layer, kind] = output.per_unit(weight.grad * weight).abs()
        if not gates:
            return
        usable = torch.stack([gate.sum().isfinite() for gate in gates.values()]).all()
        for (layer, kind), gate in gates.items():
            average = self._averages.get((layer, kind))
            if average is None:
                average = self._averages[layer, kind] = gate.new_zeros(sizes[layer][kind])
            kept = structure[layer][kind]
            if len(kept) == len(average):
                average.lerp_(torch.where(usable, gate, average), 1 - self.decay)
            else:
                index = torch.tensor(kept, device=gate.device)
                past = average[index]
                average[index] = past.lerp(torch.where(usable, gate, past), 1 - self.decay)
        self._steps += 1

    def changes(self) -> Scores:
        """Returns the estimated change of the loss without each unit."""
        correction = 1 - self.decay**self._steps
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
        """Returns the scores: the estimated changes, scaled so that layers and kinds compare."""
        changes = self.changes()
        for layer, kept in enumerate(structures.current(self.match)):
            for kind in self.kinds:
                values = changes[layer][kind]
                square = sum(values[unit] ** 2 for unit in kept[kind])
                if square > 0:
                    scale = _unit_params(self.match, layer, kind) * math.sqrt(len(kept[kind]) / square)
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
    return (size / size.mean().clamp_min(1e-30) * _unit_params(match, layer, kind)).tolist()


def _unit_params(match: Match, layer: int, kind: str) -> float:
    """Returns the parameters of one unit."""
    parts = slices(match, layer, kind)
    return sum(parameter.numel() for part in parts for parameter in part.parameters()) / parts[-1].units
