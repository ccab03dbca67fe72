"""Networks inside of a network: the same weights, of which smaller ones use the first units of each layer only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import KINDS, Match
from adaptrain.pruning.importance import Scores
from adaptrain.pruning.structure import Structure
from adaptrain.pruning.surgery import resize, shrink, slices


def importance_order(match: Match, scores: Scores) -> list[dict[str, list[int]]]:
    """Returns, for each layer and kind, the units that are left by falling importance, as positions.

    Args:
        match: The model.
        scores: The score of every unit of the dense model.
    """
    return [
        {
            kind: sorted(range(len(layer[kind])), key=lambda place: -scores[index][kind][layer[kind][place]])
            for kind in KINDS
            if kind in scores[index]
        }
        for index, layer in enumerate(structures.current(match))
    ]


def as_prefixes(match: Match, structure: Structure) -> Structure:
    """Returns the structure of the same widths that keeps the first units of each layer.

    Args:
        match: The model, nothing of which is cut.
        structure: The structure.
    """
    return [
        {kind: have[kind][: len(kept[kind])] for kind in kept}
        for have, kept in zip(structures.current(match), structure, strict=True)
    ]


class SubNetwork:
    """A smaller network that computes with a model's own weights, and whose gradients are theirs.

    Args:
        match: The model, nothing of which is cut.
        structure: The units that take part.
    """

    def __init__(self, match: Match, structure: Structure) -> None:
        self.match = match
        self.structure = structure
        self._shell = Match(match.dense_twin(), match.family)
        resize(self._shell, structures.copy_of(structure))
        for parameter in self._shell.model.parameters():
            parameter.data = parameter.data.new_empty(0)  # the model's own are put in their place
        self._buffers = dict(self._shell.model.named_buffers())
        self._cuts = self._find_cuts()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the network's output, with dropout where the model has it now."""
        shell = self._shell.model.train(self.match.model.training)
        return functional_call(shell, self.weights(), args, kwargs)

    def weights(self) -> dict[str, Tensor]:
        """Returns the part of each of the model's weights that takes part; views where that can be."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.match.model.named_parameters():
            tensor: Tensor = parameter
            for dim, index in self._cuts.get(name, ()):
                if torch.equal(index, torch.arange(len(index), device=index.device)):
                    tensor = tensor.narrow(dim, 0, len(index))
                else:
                    tensor = tensor.index_select(dim, index)
            found[name] = tensor
        return found

    def _find_cuts(self) -> dict[str, list[tuple[int, Tensor]]]:
        names = {id(parameter): name for name, parameter in self.match.model.named_parameters()}
        have = structures.current(self.match)
        cuts: dict[str, list[tuple[int, Tensor]]] = {}
        for layer, (old, kept) in enumerate(zip(have, self.structure, strict=True)):
            for kind in KINDS:
                if kept[kind] == old[kind]:
                    continue
                place = {unit: position for position, unit in enumerate(old[kind])}
                for part in slices(self.match, layer, kind):
                    index = part.index([place[unit] for unit in kept[kind]])
                    for parameter in part.parameters():
                        cuts.setdefault(names[id(parameter)], []).append((part.dim_of(parameter), index))
        return cuts


def cut_out(match: Match, structure: Structure) -> Match:
    """Returns a new model with the weights of those units alone; the model itself stays as it is."""
    twin = Match(match.dense_twin(), match.family)
    twin.model.load_state_dict(match.model.state_dict())
    shrink(twin, structures.copy_of(structure))
    return twin
