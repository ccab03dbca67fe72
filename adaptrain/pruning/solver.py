"""Which units to give up so that a model fits every limit at once, for the least loss of what they are worth."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adaptrain.pruning.cost_table import CostTable
from adaptrain.pruning.importance import Scores
from adaptrain.pruning.structure import Structure, copy_of, widths

_TINY = 1e-12


@dataclass(frozen=True)
class _Place:
    """Where units can go together: one layer, or all layers where they are to stay equally wide."""

    layers: tuple[int, ...]
    kind: str
    allowed: Sequence[int]


@dataclass(frozen=True)
class _Move:
    """Taking a place down to a width."""

    place: _Place
    width: int
    lost: float
    gain: float

    @property
    def price(self) -> float:
        return self.lost / self.gain


def solve(
    structure: Structure,
    scores: Scores,
    table: CostTable,
    limits: Mapping[str, float],
    round_to: Mapping[str, int],
    uniform: Mapping[str, Sequence[int]] | None = None,
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
        uniform: Kinds that are narrowed in all layers at once, so that these stay equally wide, and the widths they
            may have, ascending; None: each layer on its own.

    Returns:
        The structure that fits; where none does, the smallest one.
    """
    ranked = [
        {kind: sorted(layer[kind], key=lambda unit, s=scores[index][kind]: (-s[unit], unit)) for kind in table.kinds}
        for index, layer in enumerate(structure)
    ]
    places = _places(structure, table.kinds, round_to, uniform or {})
    now = widths(structure)
    for place in places:
        _set(now, place, min(now[layer][place.kind] for layer in place.layers))
    most = [{**layer} for layer in now]
    while moves := list(_moves(now, places, ranked, scores, table, limits)):
        best = min(moves, key=lambda move: (move.price, -move.gain, move.place.layers, move.place.kind))
        _set(now, best.place, best.width)
    _take_back(now, most, places, ranked, scores, table, limits)
    kept = copy_of(structure)
    for index, layer in enumerate(ranked):
        for kind, units in layer.items():
            kept[index][kind] = sorted(units[: now[index][kind]])
    return kept


def _places(
    structure: Structure, kinds: Sequence[str], round_to: Mapping[str, int], uniform: Mapping[str, Sequence[int]]
) -> list[_Place]:
    layers = range(len(structure))
    single = [
        _Place((layer,), kind, range(0, len(structure[layer][kind]), round_to[kind]))
        for layer in layers
        for kind in kinds
        if kind not in uniform
    ]
    return single + [_Place(tuple(layers), kind, uniform[kind]) for kind in kinds if kind in uniform]


def _set(widths: list[dict[str, int]], place: _Place, width: int) -> None:
    for layer in place.layers:
        widths[layer][place.kind] = width


def _moves(
    now: list[dict[str, int]],
    places: Sequence[_Place],
    ranked: list[dict[str, list[int]]],
    scores: Scores,
    table: CostTable,
    limits: Mapping[str, float],
) -> Iterator[_Move]:
    """Yields the ways to narrow one place that bring a cost nearer to a limit that is not met."""
    totals = table.total(now)
    excess = {name: totals[name] - limit for name, limit in limits.items() if totals[name] > limit}
    if not excess:
        return
    for place in places:
        kind, lost = place.kind, 0.0
        width = now[place.layers[0]][kind]
        for narrower in _narrower(width, place.allowed):
            lost += sum(
                scores[layer][kind][unit] for layer in place.layers for unit in ranked[layer][kind][narrower:width]
            )
            width = narrower
            gain = sum(
                min(1.0, _saving(now, place, narrower, name, table, totals) / over) for name, over in excess.items()
            )
            if gain > _TINY:
                yield _Move(place, narrower, lost, gain)


def _narrower(width: int, allowed: Sequence[int]) -> Iterator[int]:
    """Yields one step narrower, then two more, four more, ..., and the least."""
    index, count = bisect_left(allowed, width), 1
    while index > 0:
        index = max(0, index - count)
        count *= 2
        yield allowed[index]


def _saving(
    now: list[dict[str, int]], place: _Place, width: int, name: str, table: CostTable, totals: Mapping[str, float]
) -> float:
    if name != "memory":
        return sum(
            table.piece(name, layer, place.kind, now[layer][place.kind]) - table.piece(name, layer, place.kind, width)
            for layer in place.layers
        )
    narrowed = [{**kinds, place.kind: width} if index in place.layers else kinds for index, kinds in enumerate(now)]
    return totals["memory"] - table.total(narrowed)["memory"]


def _take_back(
    now: list[dict[str, int]],
    most: list[dict[str, int]],
    places: Sequence[_Place],
    ranked: list[dict[str, list[int]]],
    scores: Scores,
    table: CostTable,
    limits: Mapping[str, float],
) -> None:
    """Widens again, the most valuable first and up to `most`, where every limit is met all the same."""

    def width(place: _Place, of: list[dict[str, int]]) -> int:
        return of[place.layers[0]][place.kind]

    def worth(place: _Place) -> float:
        kind, first = place.kind, width(place, now)
        return -sum(scores[layer][kind][ranked[layer][kind][first]] for layer in place.layers)

    for place in sorted((place for place in places if width(place, now) < width(place, most)), key=worth):
        while (before := width(place, now)) < width(place, most):
            above = bisect_right(place.allowed, before)
            wider = place.allowed[above] if above < len(place.allowed) else width(place, most)
            _set(now, place, min(wider, width(place, most)))
            totals = table.total(now)
            if any(totals[name] > limit for name, limit in limits.items()):
                _set(now, place, before)
                break
