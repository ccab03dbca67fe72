"""What each unit is worth: scores that compare across layers and kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import Match
from adaptrain.pruning.projections import Slice
from adaptrain.pruning.surgery import output_slice, slices

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


def layer_adaptive(values: Sequence[float], kept: Sequence[int], worth: float = 1.0) -> list[float]:
    """Returns scores that compare across layers and kinds: what a unit is of all that are at least as good.

    A value of one unit says nothing of what taking many out of one layer does. Summed as they are, or scaled by layer,
    values let a whole layer go before another loses its second half; training could not mend that. So a unit's score
    is its value as a share of its own and all greater ones: giving up more of one layer and kind costs ever more, and
    the last unit all of what they are worth.

    Source: Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning" (LAMP), of units for weights.

    Args:
        values: A value, 0 or above, of each unit of one layer and kind.
        kept: The units that are left.
        worth: What they are worth together, as against other layers and kinds.
    """
    scores, total = [0.0] * len(values), 0.0
    for unit in sorted(kept, key=lambda unit: -values[unit]):
        total += values[unit]
        scores[unit] = worth * values[unit] / total if total > 0 else 0.0
    return scores


class RunningScores(Scorer):
    """Scores by a value of each unit that is seen at every step, averaged exponentially and debiased.

    Args:
        match: The model.
        kinds: The kinds of units to score.
        decay: Weight of the past in the average; 0.95 remembers about 20 optimizer steps.
    """

    def __init__(self, match: Match, kinds: tuple[str, ...], *, decay: float = 0.95) -> None:
        super().__init__(match, kinds)
        self.decay = decay
        self._averages: dict[tuple[int, str], Tensor] = {}
        self._indices: dict[tuple[int, str], Tensor] = {}  # of units that are left
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
        usable = torch.stack([value.sum().isfinite() for value in values.values()]).all()
        for (layer, kind), value in values.items():
            average = self._averages.get((layer, kind))
            if average is None:
                size = structures.layer_dimensions(self.match, layer)[kind]
                average = self._averages[layer, kind] = value.new_zeros(size)
            if len(value) == len(average):
                average.copy_(self._merge(average, torch.where(usable, value, self._nothing(average))))
            else:
                index = self._index(layer, kind, value)
                past = average[index]
                average[index] = self._merge(past, torch.where(usable, value, self._nothing(past)))
        self._steps += 1

    def _index(self, layer: int, kind: str, value: Tensor) -> Tensor:
        """Returns which units the values are of. Units only go: as many as before are the same ones."""
        index = self._indices.get((layer, kind))
        if index is None or len(index) != len(value):
            kept = structures.current(self.match)[layer][kind]
            index = self._indices[layer, kind] = torch.tensor(kept, device=value.device)
        return index

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
        """Returns the averages as `layer_adaptive` scores."""
        changes = self.changes()
        return [
            {
                kind: layer_adaptive(values, kept[kind], self.worth(layer, kind))
                for kind, values in changes[layer].items()
            }
            for layer, kept in enumerate(structures.current(self.match))
        ]

    def worth(self, layer: int, kind: str) -> float:
        """Returns what all units of a layer and kind are worth together, as against others."""
        return 1.0

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
    and counts for nothing. One gate on all units of a layer and kind says in the same way what these are worth
    together: its gradient is the sum of theirs.

    Sources: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference"; Michel
    et al. 2019, "Are Sixteen Heads Really Better than One?".
    """

    def __init__(self, match: Match, kinds: tuple[str, ...], *, decay: float = 0.95) -> None:
        super().__init__(match, kinds, decay=decay)
        self._together: Tensor | None = None  # of shape (layers, kinds): averages of the common gates

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
        for layer, left in enumerate(structures.current_widths(self.match)):
            for kind in self.kinds:
                output = output_slice(self.match, layer, kind) if left[kind] else None
                if output is not None:
                    weight = output.weight
                    if weight.grad is None:
                        return
                    gates[layer, kind] = output.per_unit(weight.grad * weight)
        if gates:
            self._observe_together(gates)
            self.observe({key: gate.abs() for key, gate in gates.items()})

    def _observe_together(self, gates: Mapping[tuple[int, str], Tensor]) -> None:
        common = torch.stack([gate.sum().abs() for gate in gates.values()])
        places = [layer * len(self.kinds) + self.kinds.index(kind) for layer, kind in gates]
        if self._together is None:
            self._together = common.new_zeros(len(self.match.layers), len(self.kinds))
        flat = self._together.view(-1)
        past = flat[places]
        flat[places] = torch.where(common.isfinite().all(), self._merge(past, common), past)

    def worth(self, layer: int, kind: str) -> float:
        """Returns the average of |Σ g·w| over all units of a layer and kind."""
        assert self._together is not None
        return float(self._together[layer, self.kinds.index(kind)]) / self._correction()

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages as plain Python."""
        together = None if self._together is None else self._together.tolist()
        return {**super().state_dict(), "together": together}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the averages of a run that is resumed."""
        super().load_state_dict(state)
        if state["together"] is not None:
            parameter = next(self.match.model.parameters())
            self._together = torch.tensor(state["together"], dtype=parameter.dtype, device=parameter.device)


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
    """Scores units by the size of their weights: the L2 norm over all of a unit's parameters, made `layer_adaptive`.

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
                for unit, size in zip(kept[kind], _unit_norms(match, layer, kind), strict=True):
                    values[unit] = size
            scores[layer][kind] = layer_adaptive(values, kept[kind])
    return scores


def _unit_norms(match: Match, layer: int, kind: str) -> list[float]:
    squares: Tensor | None = None
    for part in slices(match, layer, kind):
        for parameter in part.parameters():
            units = part.per_unit(parameter.double().pow(2))
            squares = units if squares is None else squares + units
    assert squares is not None
    return squares.sqrt().tolist()
