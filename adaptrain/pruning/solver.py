"""Which units to give up so that a model fits every limit at once, for the least loss of what they are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adaptrain.pruning.cost_table import CostTable
from adaptrain.pruning.importance import Scores
from adaptrain.pruning.structure import Structure, copy_of, widths

_TINY = 1e-12


@dataclass(frozen=True)
class _Move:
    """Taking a layer's units of one kind down to a width."""

    layer: int
    kind: str
    width: int
    lost: float
    gain: float

    @property
    def price(self) -> float:
        return self.lost / self.gain


def solve(
    structure: Structure, scores: Scores, table: CostTable, limits: Mapping[str, float], round_to: Mapping[str, int]
) -> Structure:
    """Cuts a structure until it meets every limit.

    A greedy knapsack: of all ways to narrow one layer's heads or neurons, by one step or by several at once, take the
    one that loses the least score for what it gains, a gain being the share of the excess over a limit that it
    removes, summed over the limits that are not met yet. Several steps at once are weighed because latency need not
    fall with every step. At the end, what the last moves gave up needlessly is taken back.

    Args:
        structure: What is left now. Nothing that is gone comes back.
        scores: What each unit is worth.
        table: What each structure costs.
        limits: The absolute limits by cost: `"params"`, `"flops"`, `"memory"`, `"latency"`.
        round_to: The width of each kind becomes a multiple of this, or 0.

    Returns:
        The structure that fits; where none does, the smallest one.
    """
    ranked = [
        {kind: sorted(layer[kind], key=lambda unit, s=scores[index][kind]: (-s[unit], unit)) for kind in table.kinds}
        for index, layer in enumerate(structure)
    ]
    now = widths(structure)
    while moves := list(_moves(now, ranked, scores, table, limits, round_to)):
        best = min(moves, key=lambda move: (move.price, -move.gain, move.layer, move.kind))
        now[best.layer][best.kind] = best.width
    _take_back(now, structure, ranked, scores, table, limits, round_to)
    kept = copy_of(structure)
    for index, layer in enumerate(ranked):
        for kind, units in layer.items():
            kept[index][kind] = sorted(units[: now[index][kind]])
    return kept


def _moves(
    now: list[dict[str, int]],
    ranked: list[dict[str, list[int]]],
    scores: Scores,
    table: CostTable,
    limits: Mapping[str, float],
    round_to: Mapping[str, int],
) -> Iterator[_Move]:
    """Yields the ways to narrow one layer that bring a cost nearer to a limit that is not met."""
    totals = table.total(now)
    excess = {name: totals[name] - limit for name, limit in limits.items() if totals[name] > limit}
    if not excess:
        return
    for layer, kinds in enumerate(ranked):
        for kind, units in kinds.items():
            width, lost = now[layer][kind], 0.0
            for narrower in _narrower(width, round_to[kind]):
                lost += sum(scores[layer][kind][unit] for unit in units[narrower:width])
                width = narrower
                gain = sum(
                    min(1.0, _saving(now, layer, kind, narrower, name, table, totals) / over)
                    for name, over in excess.items()
                )
                if gain > _TINY:
                    yield _Move(layer, kind, narrower, lost, gain)


def _narrower(width: int, step: int) -> Iterator[int]:
    """Yields one step narrower, then two more, four more, ..., and none at all."""
    count = 1
    while width > 0:
        width = max(0, (width - 1) // step * step - (count - 1) * step)
        count *= 2
        yield width


def _saving(
    now: list[dict[str, int]],
    layer: int,
    kind: str,
    width: int,
    name: str,
    table: CostTable,
    totals: Mapping[str, float],
) -> float:
    if name != "memory":
        return table.piece(name, layer, kind, now[layer][kind]) - table.piece(name, layer, kind, width)
    narrowed = [{**kinds, kind: width} if index == layer else kinds for index, kinds in enumerate(now)]
    return totals["memory"] - table.total(narrowed)["memory"]


def _take_back(
    now: list[dict[str, int]],
    structure: Structure,
    ranked: list[dict[str, list[int]]],
    scores: Scores,
    table: CostTable,
    limits: Mapping[str, float],
    round_to: Mapping[str, int],
) -> None:
    """Widens again, the most valuable first, where every limit is met all the same."""
    taken = [
        (layer, kind, len(structure[layer][kind])) for layer, kinds in enumerate(ranked) for kind in kinds
        if now[layer][kind] < len(structure[layer][kind])
    ]  # fmt: skip

    def worth(place: tuple[int, str, int]) -> float:
        layer, kind, _ = place
        return -scores[layer][kind][ranked[layer][kind][now[layer][kind]]]

    for layer, kind, most in sorted(taken, key=worth):
        while now[layer][kind] < most:
            wider = min(most, (now[layer][kind] // round_to[kind] + 1) * round_to[kind])
            before, now[layer][kind] = now[layer][kind], wider
            totals = table.total(now)
            if any(totals[name] > limit for name, limit in limits.items()):
                now[layer][kind] = before
                break
