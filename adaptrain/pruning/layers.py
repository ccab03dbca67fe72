"""Whether layers go as a whole: dropping one, and cutting less elsewhere, against cutting everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adaptrain.pruning import structure as structures
from adaptrain.pruning.cost_table import CostTable
from adaptrain.pruning.importance import Scores
from adaptrain.pruning.structure import Structure


def solve_with_layers(
    structure: Structure,
    scores: Scores,
    table: CostTable,
    limits: Mapping[str, float],
    solve: Callable[[Structure], Structure],
) -> Structure:
    """Cuts a structure until it meets every limit, with layers dropped as a whole where that loses less.

    A layer is worth what its units are worth together. The layers are dropped one after another, the one that is worth
    least first, and what then still exceeds a limit is cut by `solve`; this goes on for as long as less is lost in
    all. A layer that has no units left is dropped as well. One layer always stays.

    Args:
        structure: What is left now.
        scores: What each unit is worth.
        table: What each structure costs.
        limits: The absolute limits by cost.
        solve: Cuts units until the limits are met.

    Returns:
        The structure that fits; where none does, the one that lost least.
    """

    def worth(layer: int) -> float:
        return sum(scores[layer][kind][unit] for kind in table.kinds for unit in structure[layer][kind])

    def lost(found: Structure) -> tuple[bool, float]:
        total = table.total(structures.widths(found))
        gone = sum(
            scores[index][kind][unit]
            for index, layer in enumerate(structure)
            for kind in table.kinds
            for unit in set(layer[kind]) - set(found[index][kind])
        )
        return any(total[name] > limit for name, limit in limits.items()), gone

    start, best = structure, _without_empty(solve(structure))
    while len(left := [index for index, layer in enumerate(start) if not structures.is_dropped(layer)]) > 1:
        start = structures.without_layer(start, min(left, key=lambda index: (worth(index), index)))
        candidate = _without_empty(solve(start))
        if lost(candidate) >= lost(best):
            break
        best = candidate
    return best


def _without_empty(structure: Structure) -> Structure:
    """Drops the layers that have no units left, but for the last that is there."""
    for index, layer in enumerate(structure):
        others = [other for other in structure if not structures.is_dropped(other)]
        if not structures.is_dropped(layer) and not any(layer.values()) and len(others) > 1:
            structure = structures.without_layer(structure, index)
    return structure
